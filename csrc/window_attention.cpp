// asvit_fast_C::window_attention and its backward pass on the CPU: schemas, checks, allocation and threads. The
// arithmetic is in cpu/.
#include "window_attention.h"

#include <ATen/core/List.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kPieces = 16;
constexpr int64_t kPieceBytes = int64_t(1) << 26;  // that the pieces' gradients of the bias may take together
constexpr double kMaximumWindowBytes = 1ll << 48;  // of one head's tokens; a few times that is below 2^63

// The arguments that forward and backward pass have in common.
struct Arguments {
  const at::Tensor& qkv;  // [B, H, W, 3 * heads * head_dim]
  int64_t heads;
  at::IntArrayRef window, shift;
  double scale;
  WindowLayout layout;
  const OptionalTensor &bias, &padding, &attn_scale;

  int64_t tokens() const { return window[0] * window[1]; }
  at::ScalarType type() const { return compute_type(qkv.scalar_type()); }
};

WindowLayout parse_layout(std::string_view name) {
  if (name == "masked") return WindowLayout::masked;
  if (name == "timm") return WindowLayout::timm;
  if (name == "torchvision") return WindowLayout::torchvision;
  TORCH_CHECK_VALUE(name == "grid", "window_attention: layout must be masked, timm, torchvision or grid, not ", name);
  return WindowLayout::grid;
}

void check(const Arguments& a) {
  TORCH_CHECK_VALUE(a.qkv.dim() == 4 && is_count(a.heads, 1) && a.qkv.size(3) > 0 && a.qkv.size(3) % (3 * a.heads) == 0,
                    "window_attention: qkv must be [B, H, W, 3 * ", a.heads, " heads * head_dim], not ", a.qkv.sizes());
  TORCH_CHECK_VALUE(is_window(a.window, a.shift) && is_count(a.tokens(), 1), "window_attention: window ", a.window,
                    " and shift ", a.shift,
                    " must be two numbers each, 0 <= shift < window, of fewer than 2^31 tokens");
  const double row_bytes = 8. * static_cast<double>(a.qkv.size(3) / (3 * a.heads) + kMaximumLanes);
  TORCH_CHECK_VALUE(row_bytes * static_cast<double>(a.tokens()) < kMaximumWindowBytes, "window_attention: a window of ",
                    a.window, " tokens of ", a.qkv.size(3), " channels is too large");
  const auto divides = [&](int side) { return a.shift[side] == 0 && a.qkv.size(side + 1) % a.window[side] == 0; };
  TORCH_CHECK_VALUE(a.layout != WindowLayout::grid || (divides(0) && divides(1)),
                    "window_attention: with the layout grid windows must divide the map, without a shift");
  scalar_type(kOp, a.qkv.scalar_type());
  check_operand(kOp, "bias", a.bias, {a.heads, a.tokens(), a.tokens()}, a.qkv);
  check_operand(kOp, "padding", a.padding, {a.qkv.size(3)}, a.qkv);
  check_operand(kOp, "attn_scale", a.attn_scale, {a.heads}, a.qkv);
}

// In the type that is computed in (low precision is widened once), channels neighbours.
at::Tensor map_operand(const at::Tensor& map, at::ScalarType type) {
  const at::Tensor wide = map.to(type);
  return wide.stride(3) == 1 ? wide : wide.contiguous();
}

template <typename T>
TokenMap<const T> token_map(const at::Tensor& map) {
  return {map.const_data_ptr<T>(), map.stride(0), map.stride(1), map.stride(2)};
}

// Operands as the kernels want them.
struct Operands {
  at::Tensor qkv, bias, bias_table, padding, attn_scale;

  explicit Operands(const Arguments& a)
      : qkv(map_operand(a.qkv, a.type())),
        bias(parameters(a.bias, a.type())),
        attn_scale(parameters(a.attn_scale, a.type())) {
    padding = a.padding ? parameters(a.padding, a.type()) : at::zeros({qkv.size(3)}, qkv.options());
    if (!a.bias || !uses_bias_table(a.tokens())) return;
    bias_table = at::zeros({a.heads, a.tokens(), padded_to_vector(a.tokens())}, qkv.options());
    bias_table.narrow(2, 0, a.tokens()).copy_(bias.transpose(1, 2));
  }

  template <typename T>
  WindowAttention<T> problem(const Arguments& a, const at::Tensor& output, const at::Tensor& statistics) const {
    return {token_map<T>(qkv),
            padding.const_data_ptr<T>(),
            pointer_or_null<T>(bias),
            pointer_or_null<T>(bias_table),
            pointer_or_null<T>(attn_scale),
            output.mutable_data_ptr<T>(),
            statistics.mutable_data_ptr<T>(),
            {qkv.size(1), a.window[0], a.shift[0]},
            {qkv.size(2), a.window[1], a.shift[1]},
            a.layout,
            qkv.size(0),
            a.heads,
            qkv.size(3) / (3 * a.heads),
            static_cast<T>(a.scale)};
  }
};

std::tuple<at::Tensor, at::Tensor> window_attention_cpu(const at::Tensor& qkv, int64_t heads, at::IntArrayRef window,
                                                        at::IntArrayRef shift, double scale, std::string_view layout,
                                                        const OptionalTensor& bias, const OptionalTensor& padding,
                                                        const OptionalTensor& attn_scale) {
  const Arguments arguments{qkv, heads, window, shift, scale, parse_layout(layout), bias, padding, attn_scale};
  check(arguments);
  const Operands operands(arguments);
  const auto options = operands.qkv.options();
  const at::Tensor output = at::empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, options);
  const at::Tensor statistics = at::empty({2, qkv.size(0), qkv.size(1), qkv.size(2), heads}, options);
  if (output.numel() > 0)
    with_compute_type(kOp, arguments.type(), [&](auto zero) {
      using T = decltype(zero);
      const auto problem = operands.problem<T>(arguments, output, statistics);
      const int64_t tokens = window_tokens(problem);
      const double work = 2. * std::min(tokens, kUnit) * tokens * problem.head_dim;
      const auto kernel = ASVIT_FAST_SELECT(window_attention<T>);
      parallel_with_memory<ForwardMemory<T>>(
          problem, window_count(problem) * heads * query_units(problem), work,
          [&](int64_t begin, int64_t end, char* memory) { kernel(problem, begin, end, memory); });
    });
  return {output.to(qkv.scalar_type()), statistics};
}

// Fixed by the shapes alone, so that sums do not depend on the number of threads.
int64_t piece_count(int64_t windows, bool parameters, int64_t bias_bytes) {
  if (!parameters) return windows;
  return std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(bias_bytes, 1), 1,
                             std::clamp<int64_t>(windows, 1, kPieces));
}

// A parameter's gradient: the sum over pieces [pieces, ...] in its type; empty where it is not needed.
at::Tensor sum_pieces(const at::Tensor& pieces, const OptionalTensor& parameter, const at::Tensor& qkv) {
  if (!pieces.defined()) return at::empty({0}, qkv.options());
  return (pieces.size(0) == 1 ? pieces.squeeze(0) : pieces.sum(0)).to(parameter->scalar_type());
}

// Gradients of parameters, a slice for each piece; undefined where they are not needed.
struct Pieces {
  int64_t count;
  at::Tensor bias, padding, attn_scale;

  Pieces(const Arguments& a, const c10::List<bool>& needs_grad, int64_t windows, const at::TensorOptions& options) {
    const int64_t row = uses_bias_table(a.tokens()) ? padded_to_vector(a.tokens()) : a.tokens();
    const int64_t bytes =
        needs_grad[0] ? a.heads * a.tokens() * row * static_cast<int64_t>(options.dtype().itemsize()) : 0;
    count = piece_count(windows, needs_grad[0] || needs_grad[1] || needs_grad[2], bytes);
    if (needs_grad[0]) bias = at::zeros({count, a.heads, a.tokens(), row}, options);
    if (needs_grad[1]) padding = at::zeros({count, a.qkv.size(3)}, options);
    if (needs_grad[2]) attn_scale = at::zeros({count, a.heads}, options);
  }
};

template <typename T>
void run_backward(const WindowAttentionBackward<T>& problem) {
  const WindowAttention<T>& forward = problem.forward;
  const double tokens = window_tokens(forward), windows = window_count(forward);
  const auto kernel = ASVIT_FAST_SELECT(window_attention_backward<T>);
  parallel_with_memory<BackwardMemory<T>>(
      forward, problem.pieces * forward.heads, 5 * tokens * tokens * forward.head_dim * windows / problem.pieces,
      [&](int64_t begin, int64_t end, char* memory) { kernel(problem, begin, end, memory); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> window_attention_backward_cpu(
    const at::Tensor& gradient, const at::Tensor& qkv, const at::Tensor& output, const at::Tensor& statistics,
    int64_t heads, at::IntArrayRef window, at::IntArrayRef shift, double scale, std::string_view layout,
    const OptionalTensor& bias, const OptionalTensor& padding, const OptionalTensor& attn_scale,
    const c10::List<bool>& needs_grad) {
  const Arguments arguments{qkv, heads, window, shift, scale, parse_layout(layout), bias, padding, attn_scale};
  check(arguments);
  const char* const op = "window_attention_backward";
  const auto image = qkv.sizes().slice(0, 3);
  const int64_t batch = image[0], height = image[1], width = image[2];
  check_operand(op, "gradient", gradient, {batch, height, width, qkv.size(3) / 3}, qkv);
  check_operand(op, "output", output, {batch, height, width, qkv.size(3) / 3}, qkv);
  check_operand(op, "statistics", statistics, {2, batch, height, width, heads}, qkv);
  TORCH_CHECK_TYPE(statistics.scalar_type() == arguments.type(), op, ": statistics must be ", arguments.type(),
                   ", not ", statistics.scalar_type());
  TORCH_CHECK_VALUE(needs_grad.size() == 3 && (bias || !needs_grad[0]) && (padding || !needs_grad[1]) &&
                        (attn_scale || !needs_grad[2]),
                    "window_attention_backward: no bias, padding or attn_scale to find the gradient of");
  const Operands operands(arguments);
  const at::Tensor grad_qkv = at::empty(qkv.sizes(), operands.qkv.options());
  at::Tensor grad_bias, grad_pad_token, grad_attn_scale;
  with_compute_type(kOp, arguments.type(), [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor wide_output = output.to(arguments.type()).contiguous();
    const at::Tensor wide_gradient = map_operand(gradient, arguments.type()), rows = statistics.contiguous();
    const auto forward = operands.problem<T>(arguments, wide_output, rows);
    const Pieces pieces(arguments, needs_grad, window_count(forward), grad_qkv.options());
    if (grad_qkv.numel() > 0)
      run_backward<T>({forward, token_map<T>(wide_gradient), grad_qkv.mutable_data_ptr<T>(),
                       mutable_or_null<T>(pieces.bias), mutable_or_null<T>(pieces.padding),
                       mutable_or_null<T>(pieces.attn_scale), pieces.count});
    grad_bias = sum_pieces(pieces.bias, bias, qkv);
    grad_pad_token = sum_pieces(pieces.padding, padding, qkv);
    grad_attn_scale = sum_pieces(pieces.attn_scale, attn_scale, qkv);
  });
  if (needs_grad[0] && uses_bias_table(arguments.tokens()))
    grad_bias = grad_bias.narrow(2, 0, arguments.tokens()).transpose(1, 2).contiguous();
  return {grad_qkv.to(qkv.scalar_type()), grad_bias, grad_pad_token, grad_attn_scale};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "window_attention(Tensor qkv, int heads, int[] window, int[] shift, float scale, str layout, Tensor? bias, "
      "Tensor? padding, Tensor? attn_scale) -> (Tensor, Tensor)");
  library.def(
      "window_attention_backward(Tensor gradient, Tensor qkv, Tensor output, Tensor statistics, int heads, int[] "
      "window, int[] shift, float scale, str layout, Tensor? bias, Tensor? padding, Tensor? attn_scale, bool[] "
      "needs_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("window_attention", window_attention_cpu);
  library.impl("window_attention_backward", window_attention_backward_cpu);
}

}  // namespace asvit_fast
