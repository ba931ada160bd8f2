// asvit_fast_C::window_attention_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and
// cuda/.
#include "window_attention_taylor.h"

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "window_attention_taylor";

template <typename T>
AttentionOperand<T> operand(const Tensor& x) {
  const Sizes strides = x.strides();
  return {x.const_data_ptr<T>(), {strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]}};
}

template <typename T>
WindowAttentionTaylor<T> make_problem(const Tensor& q, const Tensor& k, const Tensor& v, Sizes window, Sizes shift,
                                      const T* bias, double scale, const Tensor& output) {
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

void check(const Tensor& q, const Tensor& k, const Tensor& v, Sizes window, Sizes shift, const OptionalTensor& bias) {
  ASVIT_FAST_CHECK(q.dim() == 6 && q.size(0) >= 1 && q.size(0) <= 3, kOp,
                   ": q must be [orders + 1, B, H, W, heads, head_dim] with 0 to 2 orders, not ", q.sizes());
  ASVIT_FAST_CHECK(k.sizes().equals(q.sizes()) && v.sizes().equals(q.sizes()), kOp, ": q ", q.sizes(), ", k ",
                   k.sizes(), " and v ", v.sizes(), " must have the same shape");
  ASVIT_FAST_CHECK(is_window(window, shift, 2), kOp, ": window ", window, " and shift ", shift,
                   " must be two numbers below 2^31 each, 0 <= shift < window");
  ASVIT_FAST_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                       (!bias || bias->scalar_type() == q.scalar_type()),
                   kOp, ": q, k, v and bias must have one dtype");
  check_device_and_type(kOp, "k", k, q);
  check_device_and_type(kOp, "v", v, q);
  const int64_t tokens = window[0] * window[1];
  check_operand(kOp, "bias", bias, {q.size(4), tokens, tokens}, q);
}

// The output that run(problem) writes, which may be of either type.
template <typename Run>
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, Sizes window, Sizes shift, const OptionalTensor& bias,
              double scale, Run run) {
  const Dtype type = compute_type(q.scalar_type());
  const Tensor wide_q = as_type(q, type), wide_k = as_type(k, type), wide_v = as_type(v, type);
  const OptionalTensor wide_bias = parameters(bias, type);
  const OwnedSizes sizes = {q.size(0), q.size(1), q.size(2), q.size(3), q.size(4) * q.size(5)};
  const Tensor output = q.is_cpu() ? new_empty(sizes, type) : empty(sizes, type, q.device());
  with_compute_type(kOp, type, [&](auto zero) {
    using T = decltype(zero);
    if (output.numel() > 0)
      run(make_problem<T>(wide_q, wide_k, wide_v, window, shift, pointer_or_null<T>(wide_bias), scale, output));
  });
  return as_type(output, q.scalar_type());
}

Tensor window_attention_taylor_cpu(const Tensor& q, const Tensor& k, const Tensor& v, Sizes window, Sizes shift,
                                   const OptionalTensor& bias, double scale) {
  check(q, k, v, window, shift, bias);
  return attend(q, k, v, window, shift, bias, scale, [](const auto& problem) { run_cpu(problem); });
}

#ifdef ASVIT_FAST_CUDA
Tensor window_attention_taylor_gpu(const Tensor& q, const Tensor& k, const Tensor& v, Sizes window, Sizes shift,
                                   const OptionalTensor& bias, double scale) {
  check(q, k, v, window, shift, bias);
  ASVIT_FAST_CHECK(q.size(5) <= kMaximumHeadDimCuda, kOp, ": head_dim ", q.size(5),
                   " is too large for the CUDA kernel, which goes up to ", kMaximumHeadDimCuda);
  return attend(q, k, v, window, shift, bias, scale, [&](const auto& problem) {
    launch_cuda(q, [&](void* stream) { window_attention_taylor_cuda(problem, stream); });
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "window_attention_taylor(Tensor q, Tensor k, Tensor v, int[] window, int[] shift, Tensor? bias, float scale) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("window_attention_taylor", TORCH_BOX(&window_attention_taylor_cpu));
}

#ifdef ASVIT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("window_attention_taylor", TORCH_BOX(&window_attention_taylor_gpu));
}
#endif

}  // namespace asvit_fast
