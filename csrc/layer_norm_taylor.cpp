// asvit_fast_C::layer_norm_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "layer_norm_taylor.h"

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "layer_norm_taylor";

void check(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  check_rows(kOp, x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
}

Tensor layer_norm_taylor_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check(x, weight, bias);
  return run_taylor_cpu(kOp, x, [&](auto zero, const Tensor& input, const Tensor& output) {
    using T = decltype(zero);
    const OptionalTensor scale = parameters(weight, input.scalar_type()),
                         offset = parameters(bias, input.scalar_type());
    const TaylorMatrix<T> matrix = taylor_matrix<T>(input, output);
    const auto kernel = ASVIT_FAST_SELECT(layer_norm_taylor<T>);
    parallel_for(0, matrix.count, grain_size(kElements, matrix.size), [&](int64_t begin, int64_t end) {
      kernel(matrix, pointer_or_null<T>(scale), pointer_or_null<T>(offset), eps, begin, end);
    });
  });
}

#ifdef ASVIT_FAST_CUDA
Tensor layer_norm_taylor_gpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check(x, weight, bias);
  const Dtype type = compute_type(x.scalar_type());
  const OptionalTensor scale = parameters(weight, type), offset = parameters(bias, type);
  const auto launch = [&](const Tensor& input, const Tensor& output, ScalarType type, void* stream) {
    layer_norm_taylor_cuda(taylor_matrix<void>(input, output), pointer_or_null<void>(scale),
                           pointer_or_null<void>(offset), eps, type, stream);
  };
  return run_taylor_cuda(kOp, x, launch);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("layer_norm_taylor(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("layer_norm_taylor", TORCH_BOX(&layer_norm_taylor_cpu));
}

#ifdef ASVIT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("layer_norm_taylor", TORCH_BOX(&layer_norm_taylor_gpu));
}
#endif

}  // namespace asvit_fast
