// asvit_fast_C::layer_norm_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "layer_norm_taylor.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "cpu/dispatch.h"
#include "stacked.h"

#ifdef ASVIT_FAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace asvit_fast {
namespace {

constexpr const char* kOp = "layer_norm_taylor";
using Parameters = std::optional<at::Tensor>;

template <typename T>
constexpr PerIsa<LayerNormTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<LayerNormTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(layer_norm_taylor_f32);
template <>
constexpr PerIsa<LayerNormTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(layer_norm_taylor_f64);

void check(const at::Tensor& x, const Parameters& weight, const Parameters& bias) {
  taylor_orders(kOp, x);
  check_rows(kOp, x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
}

template <typename T>
void run_cpu(const at::Tensor& input, const at::Tensor& output, const at::Tensor& weight, const at::Tensor& bias,
             double eps) {
  const TaylorMatrix<T> matrix = stacked_matrix<T>(input, output);
  const T *scale = pointer_or_null<T>(weight), *offset = pointer_or_null<T>(bias);
  const auto kernel = select(kKernels<T>);
  at::parallel_for(0, matrix.count, rows_per_thread(matrix.size),
                   [&](int64_t begin, int64_t end) { kernel(matrix, scale, offset, eps, begin, end); });
}

at::Tensor layer_norm_taylor_cpu(const at::Tensor& x, const Parameters& weight, const Parameters& bias, double eps) {
  check(x, weight, bias);
  const at::ScalarType type = compute_type(x.scalar_type());
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, kOp, ": no kernel for ", x.scalar_type());
  const at::Tensor input = x.to(type).contiguous();
  const at::Tensor output = at::empty_like(input);
  if (type == at::kFloat) {
    run_cpu<float>(input, output, parameters(weight, type), parameters(bias, type), eps);
  } else {
    run_cpu<double>(input, output, parameters(weight, type), parameters(bias, type), eps);
  }
  return output.to(x.scalar_type());
}

#ifdef ASVIT_FAST_CUDA
at::Tensor layer_norm_taylor_gpu(const at::Tensor& x, const Parameters& weight, const Parameters& bias, double eps) {
  check(x, weight, bias);
  const ScalarType type = scalar_type(kOp, x.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) return output;  // a grid of no blocks is an invalid launch
  const at::Tensor scale = parameters(weight, compute_type(x.scalar_type()));
  const at::Tensor offset = parameters(bias, compute_type(x.scalar_type()));
  layer_norm_taylor_cuda(stacked_matrix(input, output), scale.defined() ? scale.const_data_ptr() : nullptr,
                         offset.defined() ? offset.const_data_ptr() : nullptr, eps, type,
                         c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
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
