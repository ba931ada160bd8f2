// asvit_fast_C::gelu_taylor, tanh_taylor: schemas, checks, allocation, threads and streams. The arithmetic is in cpu/
// and cuda/.
#include "unary_taylor.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "cpu/dispatch.h"
#include "stacked.h"

#ifdef ASVIT_FAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace asvit_fast {
namespace {

constexpr int64_t kGrain = 1 << 13;  // columns a thread should have at least; below, waking it costs more than it saves

template <typename T>
constexpr PerIsa<UnaryTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<UnaryTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(unary_taylor_f32);
template <>
constexpr PerIsa<UnaryTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(unary_taylor_f64);

UnaryFunction gelu(std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh",
                    "gelu_taylor: approximate must be 'none' or 'tanh', not '", approximate, "'");
  return approximate == "tanh" ? UnaryFunction::gelu_tanh : UnaryFunction::gelu;
}

// input, output: [orders + 1, ..., C], contiguous; bias: [C] or undefined
template <typename T>
TaylorRows<T> stacked_rows(const at::Tensor& input, const at::Tensor& output, const at::Tensor& bias) {
  const int orders = static_cast<int>(input.size(0)) - 1;
  return {input.const_data_ptr<T>(), output.mutable_data_ptr<T>(),     input.numel() / (orders + 1), orders,
          pointer_or_null<T>(bias),  bias.defined() ? bias.size(0) : 1};
}

template <typename T>
void run_cpu(const at::Tensor& input, const at::Tensor& output, const at::Tensor& bias, UnaryFunction function) {
  const TaylorRows<T> rows = stacked_rows<T>(input, output, bias);
  const auto kernel = select(kKernels<T>);
  at::parallel_for(0, rows.count, kGrain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end, function); });
}

at::Tensor apply_cpu(const char* op, UnaryFunction function, const at::Tensor& x,
                     const std::optional<at::Tensor>& bias) {
  taylor_orders(op, x);
  check_channels(op, "bias", bias, x);
  const at::ScalarType type = compute_type(x.scalar_type());
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op, ": no kernel for ", x.scalar_type());
  const at::Tensor input = x.to(type).contiguous();
  const at::Tensor output = at::empty_like(input);
  if (type == at::kFloat) {
    run_cpu<float>(input, output, parameters(bias, type), function);
  } else {
    run_cpu<double>(input, output, parameters(bias, type), function);
  }
  return output.to(x.scalar_type());
}

at::Tensor gelu_taylor_cpu(const at::Tensor& x, std::string_view approximate, const std::optional<at::Tensor>& bias) {
  return apply_cpu("gelu_taylor", gelu(approximate), x, bias);
}

at::Tensor tanh_taylor_cpu(const at::Tensor& x) { return apply_cpu("tanh_taylor", UnaryFunction::tanh, x, {}); }

#ifdef ASVIT_FAST_CUDA
at::Tensor apply_gpu(const char* op, UnaryFunction function, const at::Tensor& x,
                     const std::optional<at::Tensor>& bias) {
  const int orders = taylor_orders(op, x);
  check_channels(op, "bias", bias, x);
  const ScalarType type = scalar_type(op, x.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) return output;  // a grid of no blocks is an invalid launch
  const at::Tensor channels = parameters(bias, compute_type(x.scalar_type()));
  const TaylorRows<void> rows{input.const_data_ptr(),
                              output.mutable_data_ptr(),
                              input.numel() / (orders + 1),
                              orders,
                              channels.defined() ? channels.const_data_ptr() : nullptr,
                              channels.defined() ? channels.size(0) : 1};
  unary_taylor_cuda(rows, function, type, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

at::Tensor gelu_taylor_gpu(const at::Tensor& x, std::string_view approximate, const std::optional<at::Tensor>& bias) {
  return apply_gpu("gelu_taylor", gelu(approximate), x, bias);
}

at::Tensor tanh_taylor_gpu(const at::Tensor& x) { return apply_gpu("tanh_taylor", UnaryFunction::tanh, x, {}); }
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("gelu_taylor(Tensor x, str approximate, Tensor? bias=None) -> Tensor");
  library.def("tanh_taylor(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("gelu_taylor", gelu_taylor_cpu);
  library.impl("tanh_taylor", tanh_taylor_cpu);
}

#ifdef ASVIT_FAST_CUDA
TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("gelu_taylor", gelu_taylor_gpu);
  library.impl("tanh_taylor", tanh_taylor_gpu);
}
#endif

}  // namespace asvit_fast
