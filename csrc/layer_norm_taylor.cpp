// asvit_fast_C::layer_norm_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "layer_norm_taylor.h"

#include <torch/library.h>

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "layer_norm_taylor";

void check(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_rows(kOp, x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
}

at::Tensor layer_norm_taylor_cpu(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                 double eps) {
  check(x, weight, bias);
  return run_taylor_cpu(kOp, x, [&](auto zero, const at::Tensor& input, const at::Tensor& output) {
    using T = decltype(zero);
    const at::Tensor scale = parameters(weight, input.scalar_type()), offset = parameters(bias, input.scalar_type());
    const TaylorMatrix<T> matrix = taylor_matrix<T>(input, output);
    const auto kernel = ASVIT_FAST_SELECT(layer_norm_taylor<T>);
    at::parallel_for(0, matrix.count, grain_size(kElements, matrix.size), [&](int64_t begin, int64_t end) {
      kernel(matrix, pointer_or_null<T>(scale), pointer_or_null<T>(offset), eps, begin, end);
    });
  });
}

#ifdef ASVIT_FAST_CUDA
at::Tensor layer_norm_taylor_gpu(const at::Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                 double eps) {
  check(x, weight, bias);
  const at::ScalarType type = compute_type(x.scalar_type());
  const at::Tensor scale = parameters(weight, type), offset = parameters(bias, type);
  const auto launch = [&](const at::Tensor& input, const at::Tensor& output, ScalarType type, void* stream) {
    layer_norm_taylor_cuda(taylor_matrix<void>(input, output), scale.defined() ? scale.const_data_ptr() : nullptr,
                           offset.defined() ? offset.const_data_ptr() : nullptr, eps, type, stream);
  };
  return run_taylor_cuda(kOp, x, launch);
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("layer_norm_taylor(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) { library.impl("layer_norm_taylor", layer_norm_taylor_cpu); }

#ifdef ASVIT_FAST_CUDA
TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) { library.impl("layer_norm_taylor", layer_norm_taylor_gpu); }
#endif

}  // namespace asvit_fast
