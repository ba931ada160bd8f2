// asvit_fast_C::window_attention and its backward pass on the CPU: schemas, checks, allocation and threads. The
// arithmetic is in cpu/.
#include "window_attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "window_attention_tensors.h"

namespace asvit_fast {
namespace {

constexpr int64_t kBiasPieces = 16;
constexpr int64_t kBiasBytes = int64_t(1) << 26;  // that the pieces' gradients of the bias may take together

template <typename T>
constexpr PerIsa<WindowAttentionBackwardCpu<T>> kBackward;
template <>
constexpr PerIsa<WindowAttentionBackwardCpu<float>> kBackward<float> =
    ASVIT_FAST_PER_ISA(window_attention_backward_f32);
template <>
constexpr PerIsa<WindowAttentionBackwardCpu<double>> kBackward<double> =
    ASVIT_FAST_PER_ISA(window_attention_backward_f64);

void check(const at::Tensor& qkv, int64_t heads, at::IntArrayRef window, at::IntArrayRef shift,
           const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && heads >= 1 && qkv.size(3) > 0 && qkv.size(3) % (3 * heads) == 0,
                    "window_attention: qkv must be [B, H, W, 3 * ", heads, " heads * head_dim], not ", qkv.sizes());
  TORCH_CHECK_VALUE(window.size() == 2 && shift.size() == 2 && window[0] >= 1 && window[1] >= 1 && shift[0] >= 0 &&
                        shift[0] < window[0] && shift[1] >= 0 && shift[1] < window[1],
                    "window_attention: window ", window, " and shift ", shift,
                    " must be two numbers each, 0 <= shift < window");
  TORCH_CHECK_TYPE(qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kDouble ||
                       qkv.scalar_type() == at::kHalf || qkv.scalar_type() == at::kBFloat16,
                   "window_attention: no kernel for ", qkv.scalar_type());
  if (!bias) return;
  const int64_t tokens = window[0] * window[1];
  TORCH_CHECK_VALUE(bias->dim() == 3 && bias->size(0) == heads && bias->size(1) == tokens && bias->size(2) == tokens,
                    "window_attention: bias must be [", heads, ", ", tokens, ", ", tokens, "], not ", bias->sizes());
  TORCH_CHECK_VALUE(bias->device() == qkv.device(), "window_attention: qkv and bias must be on one device");
}

at::ScalarType working_type(const at::Tensor& qkv) {
  return qkv.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Operands in the type that is computed in. Low precision is widened once.
struct Inputs {
  at::Tensor qkv, bias;  // [B, H, W, 3, heads, head_dim]; [heads, tokens, tokens] or undefined

  Inputs(const at::Tensor& packed, int64_t heads, const std::optional<at::Tensor>& table) {
    qkv = packed.to(working_type(packed)).unflatten(3, {3, heads, packed.size(3) / (3 * heads)});
    if (table) bias = table->to(working_type(packed)).contiguous();
  }

  at::Tensor part(int64_t index) const { return qkv.select(3, index).unsqueeze(0); }

  template <typename T>
  WindowAttentionTaylor<T> problem(at::IntArrayRef window, at::IntArrayRef shift, double scale,
                                   const at::Tensor& output, const at::Tensor& statistics) const {
    return make_problem<T>(part(0), part(1), part(2), window, shift,
                           bias.defined() ? bias.const_data_ptr<T>() : nullptr, scale, output,
                           statistics.mutable_data_ptr<T>());
  }
};

// `run` with a number of the type that is computed in.
template <typename Run>
void in_working_type(const at::Tensor& qkv, Run run) {
  if (working_type(qkv) == at::kDouble) {
    run(0.);
  } else {
    run(0.f);
  }
}

std::tuple<at::Tensor, at::Tensor> window_attention_cpu(const at::Tensor& qkv, int64_t heads, at::IntArrayRef window,
                                                        at::IntArrayRef shift, const std::optional<at::Tensor>& bias,
                                                        double scale) {
  check(qkv, heads, window, shift, bias);
  const Inputs inputs(qkv, heads, bias);
  const auto options = inputs.qkv.options();
  const at::Tensor output = at::empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, options);
  const at::Tensor statistics = at::empty({2, qkv.size(0), qkv.size(1), qkv.size(2), heads}, options);
  if (output.numel() > 0)
    in_working_type(qkv, [&](auto zero) {
      using T = decltype(zero);
      run_cpu(inputs.problem<T>(window, shift, scale, output, statistics), options);
    });
  return {output.to(qkv.scalar_type()), statistics};
}

// Fixed by the shapes alone, so that sums do not depend on the number of threads.
template <typename T>
int64_t piece_count(const WindowAttentionTaylor<T>& problem, bool bias) {
  const int64_t windows = window_count(problem) / problem.heads;
  if (!bias) return windows;
  const int64_t tokens = problem.rows.window * problem.columns.window;
  const int64_t bytes = problem.heads * tokens * tokens * static_cast<int64_t>(sizeof(T));
  return std::clamp<int64_t>(kBiasBytes / bytes, 1, std::min(kBiasPieces, windows));
}

template <typename T>
void run_backward(const WindowAttentionBackward<T>& problem, const at::TensorOptions& options) {
  const auto kernel = select(kBackward<T>);
  const AttentionBackwardWorkspace workspace(problem.forward);
  const int64_t tokens = problem.forward.rows.window * problem.forward.columns.window;
  const int64_t windows = window_count(problem.forward) / problem.forward.heads;
  const double work = 5. * tokens * tokens * workspace.padded_dim * windows / problem.pieces;
  const auto grain = static_cast<int64_t>(kGrain / (work + 1)) + 1;
  at::parallel_for(0, problem.forward.heads * problem.pieces, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = at::empty({workspace.total()}, options);
    kernel(problem, begin, end, memory.mutable_data_ptr<T>());
  });
}

std::tuple<at::Tensor, at::Tensor> window_attention_backward_cpu(const at::Tensor& gradient, const at::Tensor& qkv,
                                                                 const at::Tensor& output, const at::Tensor& statistics,
                                                                 int64_t heads, at::IntArrayRef window,
                                                                 at::IntArrayRef shift,
                                                                 const std::optional<at::Tensor>& bias, double scale,
                                                                 bool bias_gradient) {
  check(qkv, heads, window, shift, bias);
  TORCH_CHECK_VALUE(gradient.sizes() == output.sizes(), "window_attention_backward: gradient ", gradient.sizes(),
                    " and output ", output.sizes(), " must have the same shape");
  TORCH_CHECK_VALUE(bias || !bias_gradient, "window_attention_backward: no bias to find the gradient of");
  const Inputs inputs(qkv, heads, bias);
  const auto options = inputs.qkv.options();
  const at::Tensor to_qkv = at::empty(inputs.qkv.sizes(), options);
  at::Tensor to_bias = bias_gradient ? at::zeros(inputs.bias.sizes(), options) : at::empty({0}, options);
  if (to_qkv.numel() > 0)
    in_working_type(qkv, [&](auto zero) {
      using T = decltype(zero);
      const at::Tensor wide_output = output.to(working_type(qkv)).contiguous();
      const at::Tensor wide_gradient = gradient.to(working_type(qkv)).unflatten(3, {heads, -1}).unsqueeze(0);
      const auto forward = inputs.problem<T>(window, shift, scale, wide_output, statistics.contiguous());
      const int64_t pieces = piece_count(forward, bias_gradient);
      at::Tensor parts;
      if (bias_gradient) parts = at::zeros({pieces, heads, to_bias.size(1), to_bias.size(2)}, options);
      T* data = to_qkv.mutable_data_ptr<T>();
      const int64_t step = to_qkv.stride(3);
      run_backward<T>({forward, operand<T>(wide_gradient), data, data + step, data + 2 * step,
                       operand<T>(to_qkv.select(3, 0).unsqueeze(0)).strides,
                       bias_gradient ? parts.mutable_data_ptr<T>() : nullptr, pieces},
                      options);
      if (bias_gradient) to_bias = parts.sum(0);
    });
  return {to_qkv.flatten(3).to(qkv.scalar_type()), bias ? to_bias.to(bias->scalar_type()) : to_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "window_attention(Tensor qkv, int heads, int[] window, int[] shift, Tensor? bias, float scale) -> (Tensor, "
      "Tensor)");
  library.def(
      "window_attention_backward(Tensor gradient, Tensor qkv, Tensor output, Tensor statistics, int heads, int[] "
      "window, int[] shift, Tensor? bias, float scale, bool bias_gradient) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("window_attention", window_attention_cpu);
  library.impl("window_attention_backward", window_attention_backward_cpu);
}

}  // namespace asvit_fast
