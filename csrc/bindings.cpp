// The Python module asvit_fast._C: which instruction sets there are and which one runs, and what memory is kept. Ops
// register themselves with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "memory_pool.h"
#include "products.h"
#include "window_attention_taylor.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of asvit_fast; the ops are in torch.ops.asvit_fast_C";
#ifdef ASVIT_FAST_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.attr("maximum_head_dim_cuda") = asvit_fast::kMaximumHeadDimCuda;  // of window_attention_taylor
  module.def("compiled_isas", &asvit_fast::compiled_isas, "Instruction sets in this build, best first");
  module.def("available_isas", &asvit_fast::available_isas, "Those of them that this CPU can run, best first");
  module.def("get_isa", &asvit_fast::get_isa, "The one that kernels run with");
  module.def("set_isa", &asvit_fast::set_isa, pybind11::arg("name"),
             "Choose another one (ValueError if it cannot run)");
  module.def("prefers_own_products", &asvit_fast::prefers_own_products,
             "Whether Linear layers run through the kernel of this package with the present instruction set");
  module.def("memory_limit", &asvit_fast::pool_limit, "Bytes of freed tensors that are kept for later ones at most");
  module.def("set_memory_limit", &asvit_fast::set_pool_limit, pybind11::arg("bytes"), "Change that, and free the rest");
  module.def("memory_kept", &asvit_fast::pool_size, "Bytes of freed tensors that are kept now");
}
