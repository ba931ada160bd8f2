// asvit_fast_C::window_attention_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "window_attention_taylor.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

constexpr double kGrain = 1 << 18;  // multiply-adds a thread should have at least

template <typename T>
constexpr PerIsa<WindowAttentionTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<WindowAttentionTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(window_attention_taylor_f32);
template <>
constexpr PerIsa<WindowAttentionTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(window_attention_taylor_f64);

template <typename T>
AttentionOperand<T> operand(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), x.stride(5)}};
}

template <typename T>
WindowAttentionTaylor<T> make_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      at::IntArrayRef window, at::IntArrayRef shift, const T* bias, double scale,
                                      const at::Tensor& output) {
  return {operand<T>(q),
          operand<T>(k),
          operand<T>(v),
          bias,
          output.mutable_data_ptr<T>(),
          {q.size(2), window[0], shift[0]},
          {q.size(3), window[1], shift[1]},
          q.size(1),
          q.size(4),
          q.size(5),
          static_cast<int>(q.size(0)) - 1,
          static_cast<T>(scale)};
}

template <typename T>
void run_cpu(const WindowAttentionTaylor<T>& problem, const at::TensorOptions& options) {
  const auto kernel = select(kKernels<T>);
  const AttentionWorkspace workspace(problem);
  const double products = (problem.orders + 1) * (problem.orders + 2);  // of a query's and a key's components
  const double work = products * kQueriesPerUnit * static_cast<double>(workspace.values);
  const auto grain = static_cast<int64_t>(kGrain / (work + 1)) + 1;
  at::parallel_for(0, window_count(problem) * units_per_window(problem), grain, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = at::empty({workspace.total()}, options);
    kernel(problem, begin, end, memory.mutable_data_ptr<T>());
  });
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef window, at::IntArrayRef shift,
           const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(
      q.dim() == 6 && q.size(0) >= 1 && q.size(0) <= 3,
      "window_attention_taylor: q must be [orders + 1, B, H, W, heads, head_dim] with 0 to 2 orders, not ", q.sizes());
  TORCH_CHECK_VALUE(k.sizes() == q.sizes() && v.sizes() == q.sizes(), "window_attention_taylor: q ", q.sizes(), ", k ",
                    k.sizes(), " and v ", v.sizes(), " must have the same shape");
  TORCH_CHECK_VALUE(window.size() == 2 && shift.size() == 2 && is_count(window[0], 1) && is_count(window[1], 1) &&
                        shift[0] >= 0 && shift[0] < window[0] && shift[1] >= 0 && shift[1] < window[1],
                    "window_attention_taylor: window ", window, " and shift ", shift,
                    " must be two numbers below 2^31 each, 0 <= shift < window");
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                       (!bias || bias->scalar_type() == q.scalar_type()),
                   "window_attention_taylor: q, k, v and bias must have one dtype");
  check_companion("window_attention_taylor", "k", k, q);
  check_companion("window_attention_taylor", "v", v, q);
  const int64_t tokens = window[0] * window[1];
  check_operand("window_attention_taylor", "bias", bias, {q.size(4), tokens, tokens}, q);
}

at::Tensor empty_output(const at::Tensor& q) {
  return at::empty({q.size(0), q.size(1), q.size(2), q.size(3), q.size(4) * q.size(5)}, q.options());
}

at::Tensor window_attention_taylor_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       at::IntArrayRef window, at::IntArrayRef shift,
                                       const std::optional<at::Tensor>& bias, double scale) {
  check(q, k, v, window, shift, bias);
  if (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) {
    const std::optional<at::Tensor> wide = bias ? std::make_optional(bias->to(at::kFloat)) : std::nullopt;
    return window_attention_taylor_cpu(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat), window, shift, wide, scale)
        .to(q.scalar_type());
  }
  const at::Tensor output = empty_output(q);
  if (output.numel() == 0) return output;
  const at::Tensor table = bias ? bias->contiguous() : at::Tensor();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = bias ? table.const_data_ptr<T>() : nullptr;
    run_cpu(make_problem<T>(q, k, v, window, shift, data, scale, output), q.options());
  };
  if (q.scalar_type() == at::kFloat) {
    run(0.f);
  } else {
    TORCH_CHECK_TYPE(q.scalar_type() == at::kDouble, "window_attention_taylor: no kernel for ", q.scalar_type());
    run(0.);
  }
  return output;
}

#ifdef ASVIT_FAST_CUDA
at::Tensor window_attention_taylor_gpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       at::IntArrayRef window, at::IntArrayRef shift,
                                       const std::optional<at::Tensor>& bias, double scale) {
  check(q, k, v, window, shift, bias);
  TORCH_CHECK_VALUE(q.size(5) <= kMaximumHeadDimCuda, "window_attention_taylor: head_dim ", q.size(5),
                    " is too large for the CUDA kernel, which goes up to ", kMaximumHeadDimCuda);
  if (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) {
    const std::optional<at::Tensor> wide = bias ? std::make_optional(bias->to(at::kFloat)) : std::nullopt;
    return window_attention_taylor_gpu(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat), window, shift, wide, scale)
        .to(q.scalar_type());
  }
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor output = empty_output(q);
  if (output.numel() == 0) return output;  // a grid of no blocks is an invalid launch
  const at::Tensor table = bias ? bias->contiguous() : at::Tensor();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = bias ? table.const_data_ptr<T>() : nullptr;
    window_attention_taylor_cuda(make_problem<T>(q, k, v, window, shift, data, scale, output),
                                 c10::cuda::getCurrentCUDAStream().stream());
  };
  if (q.scalar_type() == at::kFloat) {
    run(0.f);
  } else {
    TORCH_CHECK_TYPE(q.scalar_type() == at::kDouble, "window_attention_taylor: no kernel for ", q.scalar_type());
    run(0.);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "window_attention_taylor(Tensor q, Tensor k, Tensor v, int[] window, int[] shift, Tensor? bias, float scale) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) { library.impl("window_attention_taylor", window_attention_taylor_cpu); }

#ifdef ASVIT_FAST_CUDA
TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("window_attention_taylor", window_attention_taylor_gpu);
}
#endif

}  // namespace asvit_fast
