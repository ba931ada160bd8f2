// asvit_fast_C::softmax_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and cuda/.
#include "softmax_taylor.h"

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "softmax_taylor";

Tensor softmax_taylor_cpu(const Tensor& x) {
  check_rows(kOp, x);
  return run_taylor_cpu(kOp, x, [](auto zero, const Tensor& input, const Tensor& output) {
    using T = decltype(zero);
    const TaylorMatrix<T> matrix = taylor_matrix<T>(input, output);
    const auto kernel = ASVIT_FAST_SELECT(softmax_taylor<T>);
    parallel_for(0, matrix.count, grain_size(kElements, matrix.size),
                 [&](int64_t begin, int64_t end) { kernel(matrix, begin, end); });
  });
}

#ifdef ASVIT_FAST_CUDA
Tensor softmax_taylor_gpu(const Tensor& x) {
  check_rows(kOp, x);
  const auto launch = [](const Tensor& input, const Tensor& output, ScalarType type, void* stream) {
    softmax_taylor_cuda(taylor_matrix<void>(input, output), type, stream);
  };
  return run_taylor_cuda(kOp, x, launch);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) { library.def("softmax_taylor(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("softmax_taylor", TORCH_BOX(&softmax_taylor_cpu));
}

#ifdef ASVIT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("softmax_taylor", TORCH_BOX(&softmax_taylor_gpu));
}
#endif

}  // namespace asvit_fast
