// asvit_fast_C::window_attention and its backward pass on the CPU: schemas, checks, allocation and threads. The
// arithmetic is in cpu/.
#include "window_attention.h"

#include <ATen/core/List.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kPieces = 16;
constexpr int64_t kPieceBytes = int64_t(1) << 26;  // that the pieces' gradients of the bias may take together
constexpr double kMaximumWindowBytes = 1ll << 48;  // of one head's tokens; a few times that is below 2^63

// The arguments that forward and backward pass have in common.
struct Arguments {
  const at::Tensor& q;  // [B, *size, 3 * heads * head_dim], or without k and v's channels
  const OptionalTensor &k, &v, &bias, &padding, &attn_scale, &head_scale;
  int64_t heads;
  at::IntArrayRef window, shift, kv_window;
  double scale;
  WindowLayout layout;

  bool fused() const { return !k; }
  int64_t channels() const { return q.size(-1) / (fused() ? 3 : 1); }
  int64_t tokens() const { return c10::multiply_integers(window); }
  int64_t keys() const { return c10::multiply_integers(kv_window.empty() ? window : kv_window); }
  at::ScalarType type() const { return compute_type(q.scalar_type()); }

  // Along one of the kAxes axes.
  WindowAxis axis(int64_t index) const {
    index -= kAxes - static_cast<int64_t>(window.size());
    if (index < 0) return {1, 1, 0};
    return {q.size(index + 1), window[index], shift[index],
            kv_window.empty() ? 0 : (kv_window[index] - window[index]) / 2};
  }
};

WindowLayout parse_layout(std::string_view name) {
  if (name == "masked") return WindowLayout::masked;
  if (name == "timm") return WindowLayout::timm;
  if (name == "torchvision") return WindowLayout::torchvision;
  TORCH_CHECK_VALUE(name == "grid", "window_attention: layout must be masked, timm, torchvision or grid, not ", name);
  return WindowLayout::grid;
}

void check_windows(const Arguments& a) {
  const auto axes = a.window.size();
  TORCH_CHECK_VALUE(is_window(a.window, a.shift, axes) && is_count(a.tokens(), 1), "window_attention: window ",
                    a.window, " and shift ", a.shift, " must be ", axes,
                    " numbers each, 0 <= shift < window, of fewer than 2^31 tokens");
  TORCH_CHECK_VALUE(a.kv_window.empty() || a.kv_window.size() == axes, "window_attention: kv_window ", a.kv_window,
                    " must be ", axes, " numbers");
  for (size_t i = 0; i < a.kv_window.size(); ++i)
    TORCH_CHECK_VALUE(is_count(a.kv_window[i], a.window[i]) && (a.kv_window[i] - a.window[i]) % 2 == 0 &&
                          a.shift[i] == 0 && a.layout != WindowLayout::grid,
                      "window_attention: kv_window ", a.kv_window, " must be larger than window ", a.window,
                      " by even numbers, without a shift, and not in the layout grid");
  for (size_t i = 0; i < axes && a.layout == WindowLayout::grid; ++i)
    TORCH_CHECK_VALUE(a.shift[i] == 0 && a.q.size(static_cast<int64_t>(i) + 1) % a.window[i] == 0,
                      "window_attention: with the layout grid windows must divide the map, without a shift");
  const double row_bytes = 8. * static_cast<double>(a.channels() / a.heads + kMaximumLanes);
  TORCH_CHECK_VALUE(is_count(a.keys(), 1) && row_bytes * static_cast<double>(a.keys()) < kMaximumWindowBytes,
                    "window_attention: windows of ", a.keys(), " tokens of ", a.channels(), " channels are too large");
}

void check(const Arguments& a) {
  const auto axes = static_cast<int64_t>(a.window.size());
  TORCH_CHECK_VALUE((axes == 2 || axes == 3) && a.q.dim() == axes + 2 && is_count(a.heads, 1) && a.q.size(-1) > 0 &&
                        a.q.size(-1) % ((a.fused() ? 3 : 1) * a.heads) == 0 && a.k.has_value() == a.v.has_value(),
                    "window_attention: qkv must be [B, H, W, 3 * ", a.heads, " heads * head_dim] or [B, D, H, W, ...],",
                    " or three such maps of heads * head_dim channels, not ", a.q.sizes());
  check_windows(a);
  scalar_type(kOp, a.q.scalar_type());
  check_operand(kOp, "k", a.k, a.q.sizes(), a.q);
  check_operand(kOp, "v", a.v, a.q.sizes(), a.q);
  check_operand(kOp, "bias", a.bias, {a.heads, a.tokens(), a.keys()}, a.q);
  check_operand(kOp, "padding", a.padding, {3 * a.channels()}, a.q);
  check_operand(kOp, "attn_scale", a.attn_scale, {a.heads}, a.q);
  check_operand(kOp, "head_scale", a.head_scale, {a.heads}, a.q);
}

// The distance of neighbouring tokens of a map [B, *size, channels], if all have the same.
std::optional<int64_t> token_distance(const at::Tensor& map) {
  std::optional<int64_t> distance;
  int64_t tokens = 1;
  for (int64_t i = map.dim() - 2; i >= 0; --i) {
    if (map.size(i) == 1) continue;
    if (!distance) distance = map.stride(i);
    if (map.stride(i) != *distance * tokens) return std::nullopt;
    tokens *= map.size(i);
  }
  return distance.value_or(map.size(-1));
}

// In the type that is computed in (low precision is widened once), channels neighbours, tokens evenly spaced.
at::Tensor map_operand(const at::Tensor& map, at::ScalarType type) {
  const at::Tensor wide = map.to(type);
  return wide.stride(-1) == 1 && token_distance(wide) ? wide : wide.contiguous();
}

// Part 0, 1 or 2 of the channels of a fused map.
at::Tensor channel_part(const at::Tensor& map, int64_t part) {
  const int64_t channels = map.size(-1) / 3;
  return map.narrow(-1, part * channels, channels);
}

template <typename T>
TokenMap<T> token_map(const at::Tensor& map) {
  return {const_cast<T*>(map.const_data_ptr<std::remove_const_t<T>>()), *token_distance(map)};
}

// A matrix for each head [heads, queries, keys] -> a view [heads, whole groups of queries, keys, kGroup] of it.
at::Tensor whole_groups(const at::Tensor& matrix) {
  const int64_t groups = matrix.size(1) / kGroup;
  const at::Tensor whole = matrix.narrow(1, 0, groups * kGroup);
  return whole.unflatten(1, {groups, kGroup}).transpose(2, 3);
}

// A bias [heads, queries, keys] as [heads, groups of queries, keys, kGroup].
at::Tensor group_bias(const at::Tensor& bias) {
  const int64_t whole = bias.size(1) / kGroup, rest = bias.size(1) % kGroup;
  const at::Tensor grouped = at::empty({bias.size(0), group_count(bias.size(1)), bias.size(2), kGroup}, bias.options());
  grouped.narrow(1, 0, whole).copy_(whole_groups(bias));
  if (rest > 0) {
    const at::Tensor last = grouped.select(1, whole);
    last.narrow(2, 0, rest).copy_(bias.narrow(1, whole * kGroup, rest).transpose(1, 2));
    last.narrow(2, rest, kGroup - rest).zero_();
  }
  return grouped;
}

// The inverse for its gradient.
at::Tensor ungroup_bias(const at::Tensor& grouped, int64_t queries) {
  const int64_t whole = queries / kGroup, rest = queries % kGroup;
  const at::Tensor bias = at::empty({grouped.size(0), queries, grouped.size(2)}, grouped.options());
  whole_groups(bias).copy_(grouped.narrow(1, 0, whole));
  if (rest > 0) bias.narrow(1, whole * kGroup, rest).copy_(grouped.select(1, whole).narrow(2, 0, rest).transpose(1, 2));
  return bias;
}

// Operands as the kernels want them.
struct Operands {
  at::Tensor q, k, v, bias, padding, attn_scale, head_scale;

  explicit Operands(const Arguments& a)
      : q(map_operand(a.q, a.type())),
        attn_scale(parameters(a.attn_scale, a.type())),
        head_scale(parameters(a.head_scale, a.type())) {
    const at::Tensor fused = q;
    if (a.fused()) q = channel_part(fused, 0);
    k = a.fused() ? channel_part(fused, 1) : map_operand(*a.k, a.type());
    v = a.fused() ? channel_part(fused, 2) : map_operand(*a.v, a.type());
    padding = a.padding ? parameters(a.padding, a.type()) : at::zeros({3 * a.channels()}, q.options());
    if (a.bias) bias = group_bias(a.bias->to(a.type()));
  }

  template <typename T>
  WindowAttention<T> problem(const Arguments& a, const at::Tensor& output, const at::Tensor& statistics) const {
    return {token_map<const T>(q),
            token_map<const T>(k),
            token_map<const T>(v),
            padding.const_data_ptr<T>(),
            pointer_or_null<T>(bias),
            pointer_or_null<T>(attn_scale),
            pointer_or_null<T>(head_scale),
            output.mutable_data_ptr<T>(),
            statistics.mutable_data_ptr<T>(),
            {a.axis(0), a.axis(1), a.axis(2)},
            a.layout,
            q.size(0),
            a.heads,
            a.channels() / a.heads,
            static_cast<T>(a.scale)};
  }
};

// The sizes of the output, but for the last; and those of the statistics.
std::vector<int64_t> map_sizes(const Arguments& a, int64_t last) {
  std::vector<int64_t> sizes = a.q.sizes().vec();
  sizes.back() = last;
  return sizes;
}

std::vector<int64_t> statistics_sizes(const Arguments& a) {
  std::vector<int64_t> sizes = map_sizes(a, a.heads);
  sizes.insert(sizes.begin(), 2);
  return sizes;
}

std::tuple<at::Tensor, at::Tensor> window_attention_cpu(
    const at::Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const OptionalTensor& bias,
    const OptionalTensor& padding, const OptionalTensor& attn_scale, const OptionalTensor& head_scale, int64_t heads,
    at::IntArrayRef window, at::IntArrayRef shift, at::IntArrayRef kv_window, double scale, std::string_view layout) {
  const Arguments arguments{q,     k,      v,     bias,      padding, attn_scale,          head_scale,
                            heads, window, shift, kv_window, scale,   parse_layout(layout)};
  check(arguments);
  const Operands operands(arguments);
  const auto options = operands.q.options();
  const at::Tensor output = new_empty(map_sizes(arguments, arguments.channels()), options);
  const at::Tensor statistics = new_empty(statistics_sizes(arguments), options);
  if (output.numel() > 0)
    with_compute_type(kOp, arguments.type(), [&](auto zero) {
      using T = decltype(zero);
      const auto problem = operands.problem<T>(arguments, output, statistics);
      const double work = 2. * std::min(arguments.tokens(), kUnit) * arguments.keys() * problem.head_dim;
      const auto kernel = ASVIT_FAST_SELECT(window_attention<T>);
      parallel_with_memory<ForwardMemory<T>>(
          problem, window_count(problem) * heads * query_units(problem), work,
          [&](int64_t begin, int64_t end, char* memory) { kernel(problem, begin, end, memory); });
    });
  return {output.to(q.scalar_type()), statistics};
}

// Fixed by the shapes alone, so that sums do not depend on the number of threads.
int64_t piece_count(int64_t windows, bool parameters, int64_t bias_bytes) {
  if (!parameters) return windows;
  return std::clamp<int64_t>(kPieceBytes / std::max<int64_t>(bias_bytes, 1), 1,
                             std::clamp<int64_t>(windows, 1, kPieces));
}

// Of the operands, in their order.
enum Operand { kQ, kK, kV, kBias, kPadding, kAttnScale, kHeadScale, kOperands };

// A parameter's gradient: the sum over pieces [pieces, ...]; empty where it is not needed.
at::Tensor sum_pieces(const at::Tensor& pieces, const at::Tensor& q) {
  if (!pieces.defined()) return at::empty({0}, q.options());
  return pieces.size(0) == 1 ? pieces.squeeze(0) : pieces.sum(0);
}

// Gradients of parameters, a slice for each piece; undefined where they are not needed.
struct Pieces {
  int64_t count;
  at::Tensor bias, padding, attn_scale, head_scale;

  Pieces(const Arguments& a, const c10::List<bool>& needs_grad, int64_t windows, const at::TensorOptions& options) {
    const int64_t groups = group_count(a.tokens());
    const int64_t bytes =
        needs_grad[kBias] ? a.heads * groups * kGroup * a.keys() * static_cast<int64_t>(options.dtype().itemsize()) : 0;
    count = piece_count(
        windows, needs_grad[kBias] || needs_grad[kPadding] || needs_grad[kAttnScale] || needs_grad[kHeadScale], bytes);
    if (needs_grad[kBias]) bias = at::zeros({count, a.heads, groups, a.keys(), kGroup}, options);
    if (needs_grad[kPadding]) padding = at::zeros({count, 3 * a.channels()}, options);
    if (needs_grad[kAttnScale]) attn_scale = at::zeros({count, a.heads}, options);
    if (needs_grad[kHeadScale]) head_scale = at::zeros({count, a.heads}, options);
  }
};

// Gradients of q, k and v: parts of one fused map, or maps of their own. Where windows of keys overlap, those of k and
// v are of each window, [B * windows, keys, heads * head_dim], zeros at first.
struct MapGradients {
  at::Tensor q, k, v;
  bool overlap;

  MapGradients(const Arguments& a, int64_t windows, const at::TensorOptions& options) : overlap(!a.kv_window.empty()) {
    const auto sizes = map_sizes(a, a.channels());
    if (overlap || !a.fused()) {
      q = new_empty(sizes, options);
      k = overlap ? at::zeros({windows, a.keys(), a.channels()}, options) : new_empty(sizes, options);
      v = overlap ? at::zeros(k.sizes(), options) : new_empty(sizes, options);
    } else {
      q = new_empty(a.q.sizes(), options);
    }
  }

  template <typename T>
  TokenMap<T> map(int64_t part) const {
    if (!k.defined()) return token_map<T>(channel_part(q, part));
    if (part > 0 && overlap) return {};
    return token_map<T>(part == 0 ? q : part == 1 ? k : v);
  }

  template <typename T>
  T* window_rows(const at::Tensor& gradient) const {
    return overlap ? gradient.mutable_data_ptr<T>() : nullptr;
  }
};

template <typename T>
void run_backward(const WindowAttentionBackward<T>& problem) {
  const WindowAttention<T>& forward = problem.forward;
  const double pairs = static_cast<double>(window_tokens(forward)) * window_keys(forward) * window_count(forward);
  const auto kernel = ASVIT_FAST_SELECT(window_attention_backward<T>);
  parallel_with_memory<BackwardMemory<T>>(
      forward, problem.pieces * forward.heads, 5 * pairs * forward.head_dim / problem.pieces,
      [&](int64_t begin, int64_t end, char* memory) { kernel(problem, begin, end, memory); });
}

std::vector<at::Tensor> window_attention_backward_cpu(
    const at::Tensor& gradient, const at::Tensor& output, const at::Tensor& statistics, const at::Tensor& q,
    const OptionalTensor& k, const OptionalTensor& v, const OptionalTensor& bias, const OptionalTensor& padding,
    const OptionalTensor& attn_scale, const OptionalTensor& head_scale, int64_t heads, at::IntArrayRef window,
    at::IntArrayRef shift, at::IntArrayRef kv_window, double scale, std::string_view layout,
    const c10::List<bool>& needs_grad) {
  const Arguments arguments{q,     k,      v,     bias,      padding, attn_scale,          head_scale,
                            heads, window, shift, kv_window, scale,   parse_layout(layout)};
  check(arguments);
  const char* const op = "window_attention_backward";
  check_operand(op, "gradient", gradient, map_sizes(arguments, arguments.channels()), q);
  check_operand(op, "output", output, map_sizes(arguments, arguments.channels()), q);
  check_operand(op, "statistics", statistics, statistics_sizes(arguments), q);
  TORCH_CHECK_TYPE(statistics.scalar_type() == arguments.type(), op, ": statistics must be ", arguments.type(),
                   ", not ", statistics.scalar_type());
  const OptionalTensor* const optional[] = {&k, &v, &bias, &padding, &attn_scale, &head_scale};
  TORCH_CHECK_VALUE(needs_grad.size() == kOperands, op, ": needs_grad must be ", int{kOperands}, " values");
  for (int i = kBias; i < kOperands; ++i)
    TORCH_CHECK_VALUE(!needs_grad[i] || optional[i - 1]->has_value(), op, ": no operand ", i,
                      " to find the gradient of");
  const Operands operands(arguments);
  std::vector<at::Tensor> found(kOperands);
  with_compute_type(kOp, arguments.type(), [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor wide_output = output.to(arguments.type()).contiguous();
    const at::Tensor wide_gradient = map_operand(gradient, arguments.type()), rows = statistics.contiguous();
    const auto forward = operands.problem<T>(arguments, wide_output, rows);
    const auto options = operands.q.options();
    const Pieces pieces(arguments, needs_grad, window_count(forward), options);
    const MapGradients maps(arguments, window_count(forward), options);
    if (output.numel() > 0)
      run_backward<T>({forward, token_map<const T>(wide_gradient), maps.map<T>(0), maps.map<T>(1), maps.map<T>(2),
                       maps.window_rows<T>(maps.k), maps.window_rows<T>(maps.v), mutable_or_null<T>(pieces.bias),
                       mutable_or_null<T>(pieces.padding), mutable_or_null<T>(pieces.attn_scale),
                       mutable_or_null<T>(pieces.head_scale), pieces.count});
    found = {maps.q,
             maps.k,
             maps.v,
             sum_pieces(pieces.bias, q),
             sum_pieces(pieces.padding, q),
             sum_pieces(pieces.attn_scale, q),
             sum_pieces(pieces.head_scale, q)};
  });
  for (int i = kQ; i <= kV; ++i)
    found[i] = found[i].defined() ? found[i].to(q.scalar_type()) : at::empty({0}, q.options());
  if (needs_grad[kBias]) found[kBias] = ungroup_bias(found[kBias], arguments.tokens());
  for (int i = kBias; i < kOperands; ++i)
    if (needs_grad[i]) found[i] = found[i].to((*optional[i - 1])->scalar_type());
  return found;
}

}  // namespace

#define ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS                                                                          \
  "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? padding, Tensor? attn_scale, Tensor? head_scale, int heads, " \
  "int[] window, int[] shift, int[] kv_window, float scale, str layout"

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("window_attention(" ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("window_attention_backward(Tensor gradient, Tensor output, Tensor statistics, "  //
              ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS ", bool[] needs_grad) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("window_attention", window_attention_cpu);
  library.impl("window_attention_backward", window_attention_backward_cpu);
}

}  // namespace asvit_fast
