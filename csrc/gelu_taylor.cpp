// asvit_fast_C::gelu_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and cuda/.
#include "gelu_taylor.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <string_view>

#include "cpu/dispatch.h"

#ifdef ASVIT_FAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace asvit_fast {
namespace {

constexpr int64_t kGrain = 1 << 13;  // columns a thread should have at least; below, waking it costs more than it saves

template <typename T>
constexpr PerIsa<GeluTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<GeluTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(gelu_taylor_f32);
template <>
constexpr PerIsa<GeluTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(gelu_taylor_f64);

// x: [orders + 1, ...]; returns the number of orders.
int check(const at::Tensor& x, std::string_view approximate) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) >= 1 && x.size(0) <= 3,
                    "gelu_taylor: x must be [orders + 1, ...] with 0 to 2 orders, not ", x.sizes());
  TORCH_CHECK_VALUE(approximate == "none" || approximate == "tanh",
                    "gelu_taylor: approximate must be 'none' or 'tanh', not '", approximate, "'");
  return static_cast<int>(x.size(0)) - 1;
}

template <typename T>
void run_cpu(const at::Tensor& x, const at::Tensor& y, int orders, bool tanh) {
  const TaylorRows<T> rows{x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel() / (orders + 1), orders};
  const auto kernel = select(kKernels<T>);
  at::parallel_for(0, rows.count, kGrain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end, tanh); });
}

at::Tensor gelu_taylor_cpu(const at::Tensor& x, std::string_view approximate) {
  const int orders = check(x, approximate);
  const bool tanh = approximate == "tanh";
  if (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16)
    return gelu_taylor_cpu(x.to(at::kFloat), approximate).to(x.scalar_type());
  const at::Tensor input = x.contiguous();
  const at::Tensor output = at::empty_like(input);
  if (input.scalar_type() == at::kFloat) {
    run_cpu<float>(input, output, orders, tanh);
  } else {
    TORCH_CHECK_TYPE(input.scalar_type() == at::kDouble, "gelu_taylor: no kernel for ", x.scalar_type());
    run_cpu<double>(input, output, orders, tanh);
  }
  return output;
}

#ifdef ASVIT_FAST_CUDA
ScalarType scalar_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ScalarType::float32;
    case at::kDouble:
      return ScalarType::float64;
    case at::kHalf:
      return ScalarType::float16;
    case at::kBFloat16:
      return ScalarType::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, "gelu_taylor: no kernel for ", type);
  }
}

at::Tensor gelu_taylor_gpu(const at::Tensor& x, std::string_view approximate) {
  const int orders = check(x, approximate);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) return output;  // a grid of no blocks is an invalid launch
  gelu_taylor_cuda(input.const_data_ptr(), output.mutable_data_ptr(), input.numel() / (orders + 1), orders,
                   approximate == "tanh", scalar_type(input.scalar_type()), c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) { library.def("gelu_taylor(Tensor x, str approximate) -> Tensor"); }

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) { library.impl("gelu_taylor", gelu_taylor_cpu); }

#ifdef ASVIT_FAST_CUDA
TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) { library.impl("gelu_taylor", gelu_taylor_gpu); }
#endif

}  // namespace asvit_fast
