// asvit_fast_C::window_attention_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "window_attention_taylor.h"

#include <torch/library.h>

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "window_attention_taylor";

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
void run_cpu(const WindowAttentionTaylor<T>& problem) {
  const auto kernel = ASVIT_FAST_SELECT(window_attention_taylor<T>);
  const double products = (problem.orders + 1) * (problem.orders + 1) * (problem.orders + 2);  // of two components
  const double work = products * kQueriesPerUnit * static_cast<double>(most_tokens(problem) * problem.head_dim);
  parallel_with_memory<AttentionMemory<T>>(
      problem, window_count(problem) * units_per_window(problem), work,
      [&](int64_t begin, int64_t end, char* memory) { kernel(problem, begin, end, memory); });
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef window, at::IntArrayRef shift,
           const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(q.dim() == 6 && q.size(0) >= 1 && q.size(0) <= 3, kOp,
                    ": q must be [orders + 1, B, H, W, heads, head_dim] with 0 to 2 orders, not ", q.sizes());
  TORCH_CHECK_VALUE(k.sizes() == q.sizes() && v.sizes() == q.sizes(), kOp, ": q ", q.sizes(), ", k ", k.sizes(),
                    " and v ", v.sizes(), " must have the same shape");
  TORCH_CHECK_VALUE(is_window(window, shift, 2), kOp, ": window ", window, " and shift ", shift,
                    " must be two numbers below 2^31 each, 0 <= shift < window");
  TORCH_CHECK_TYPE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                       (!bias || bias->scalar_type() == q.scalar_type()),
                   kOp, ": q, k, v and bias must have one dtype");
  check_device_and_type(kOp, "k", k, q);
  check_device_and_type(kOp, "v", v, q);
  const int64_t tokens = window[0] * window[1];
  check_operand(kOp, "bias", bias, {q.size(4), tokens, tokens}, q);
}

// The output that run(problem) writes, which may be of either type.
template <typename Run>
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef window,
                  at::IntArrayRef shift, const OptionalTensor& bias, double scale, Run run) {
  const at::ScalarType type = compute_type(q.scalar_type());
  const at::Tensor wide_q = q.to(type), wide_k = k.to(type), wide_v = v.to(type), wide_bias = parameters(bias, type);
  const at::Tensor output =
      new_empty({q.size(0), q.size(1), q.size(2), q.size(3), q.size(4) * q.size(5)}, wide_q.options());
  with_compute_type(kOp, type, [&](auto zero) {
    using T = decltype(zero);
    if (output.numel() > 0)
      run(make_problem<T>(wide_q, wide_k, wide_v, window, shift, pointer_or_null<T>(wide_bias), scale, output));
  });
  return output.to(q.scalar_type());
}

at::Tensor window_attention_taylor_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       at::IntArrayRef window, at::IntArrayRef shift, const OptionalTensor& bias,
                                       double scale) {
  check(q, k, v, window, shift, bias);
  return attend(q, k, v, window, shift, bias, scale, [](const auto& problem) { run_cpu(problem); });
}

#ifdef ASVIT_FAST_CUDA
at::Tensor window_attention_taylor_gpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                       at::IntArrayRef window, at::IntArrayRef shift, const OptionalTensor& bias,
                                       double scale) {
  check(q, k, v, window, shift, bias);
  TORCH_CHECK_VALUE(q.size(5) <= kMaximumHeadDimCuda, kOp, ": head_dim ", q.size(5),
                    " is too large for the CUDA kernel, which goes up to ", kMaximumHeadDimCuda);
  return attend(q, k, v, window, shift, bias, scale, [&](const auto& problem) {
    launch_cuda(q, [&](void* stream) { window_attention_taylor_cuda(problem, stream); });
  });
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
