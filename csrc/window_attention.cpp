// asvit_fast_C::window_attention and its backward pass on the CPU: schemas, checks, allocation and threads. The
// arithmetic is in cpu/.
#include "window_attention.h"

#include <string>
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
  const Tensor& q;  // [B, *size, 3 * heads * head_dim], or without k and v's channels
  const OptionalTensor &k, &v, &bias, &padding, &attn_scale, &head_scale;
  int64_t heads;
  Sizes window, shift, kv_window;
  double scale;
  WindowLayout layout;

  bool fused() const { return !k; }
  int64_t channels() const { return q.size(-1) / (fused() ? 3 : 1); }
  int64_t tokens() const { return product(window); }
  int64_t keys() const { return product(kv_window.empty() ? window : kv_window); }
  Dtype type() const { return compute_type(q.scalar_type()); }

  // Along one of the kAxes axes.
  WindowAxis axis(int64_t index) const {
    index -= kAxes - static_cast<int64_t>(window.size());
    if (index < 0) return {1, 1, 0};
    return {q.size(index + 1), window[index], shift[index],
            kv_window.empty() ? 0 : (kv_window[index] - window[index]) / 2};
  }
};

WindowLayout parse_layout(const std::string& name) {
  if (name == "masked") return WindowLayout::masked;
  if (name == "timm") return WindowLayout::timm;
  if (name == "torchvision") return WindowLayout::torchvision;
  ASVIT_FAST_CHECK(name == "grid", "window_attention: layout must be masked, timm, torchvision or grid, not ", name);
  return WindowLayout::grid;
}

void check_windows(const Arguments& a) {
  const auto axes = a.window.size();
  ASVIT_FAST_CHECK(is_window(a.window, a.shift, axes) && is_count(a.tokens(), 1), "window_attention: window ", a.window,
                   " and shift ", a.shift, " must be ", axes,
                   " numbers each, 0 <= shift < window, of fewer than 2^31 tokens");
  ASVIT_FAST_CHECK(a.kv_window.empty() || a.kv_window.size() == axes, "window_attention: kv_window ", a.kv_window,
                   " must be ", axes, " numbers");
  for (size_t i = 0; i < a.kv_window.size(); ++i)
    ASVIT_FAST_CHECK(is_count(a.kv_window[i], a.window[i]) && (a.kv_window[i] - a.window[i]) % 2 == 0 &&
                         a.shift[i] == 0 && a.layout != WindowLayout::grid,
                     "window_attention: kv_window ", a.kv_window, " must be larger than window ", a.window,
                     " by even numbers, without a shift, and not in the layout grid");
  for (size_t i = 0; i < axes && a.layout == WindowLayout::grid; ++i)
    ASVIT_FAST_CHECK(a.shift[i] == 0 && a.q.size(static_cast<int64_t>(i) + 1) % a.window[i] == 0,
                     "window_attention: with the layout grid windows must divide the map, without a shift");
  const double row_bytes = 8. * static_cast<double>(a.channels() / a.heads + kMaximumLanes);
  ASVIT_FAST_CHECK(is_count(a.keys(), 1) && row_bytes * static_cast<double>(a.keys()) < kMaximumWindowBytes,
                   "window_attention: windows of ", a.keys(), " tokens of ", a.channels(), " channels are too large");
}

void check(const Arguments& a) {
  const auto axes = static_cast<int64_t>(a.window.size());
  ASVIT_FAST_CHECK((axes == 2 || axes == 3) && a.q.dim() == axes + 2 && is_count(a.heads, 1) && a.q.size(-1) > 0 &&
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
std::optional<int64_t> token_distance(const Tensor& map) {
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

// Channels neighbours, tokens evenly spaced.
Tensor map_operand(const Tensor& map) { return map.stride(-1) == 1 && token_distance(map) ? map : as_contiguous(map); }

// Of the channels of a map, those from `first` on.
TokenMap<const char> token_map(const Tensor& map, int64_t first = 0) {
  const ScalarType type = scalar_type(kOp, map.scalar_type());
  return {static_cast<const char*>(map.const_data_ptr()) + first * element_bytes(type), *token_distance(map), type};
}

TokenMap<char> mutable_token_map(const Tensor& map, int64_t first = 0) {
  const ScalarType type = scalar_type(kOp, map.scalar_type());
  return {static_cast<char*>(map.mutable_data_ptr()) + first * element_bytes(type), *token_distance(map), type};
}

// A bias [heads, queries, keys] as [heads, groups of queries, keys, kGroup], with zeros for missing queries.
Tensor group_bias(const Tensor& bias, Dtype type) {
  const int64_t heads = bias.size(0), queries = bias.size(1), keys = bias.size(2);
  const Tensor grouped = empty({heads, group_count(queries), keys, kGroup}, type);
  const Tensor rows = reshaped(as_contiguous(bias), {heads * queries, keys});
  with_compute_type(kOp, type, [&](auto zero) {
    using T = decltype(zero);
    T* const to = grouped.mutable_data_ptr<T>();
    const auto kernel = ASVIT_FAST_SELECT(group_queries<T>);
    parallel_for(0, heads, grain_size(kElements, queries * keys), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const Tensor wide = widened<T>(rows_of(rows, head * queries, queries));
        kernel(wide.const_data_ptr<T>(), queries, keys, to + head * group_count(queries) * keys * kGroup);
      }
    });
  });
  return grouped;
}

// The inverse for its gradient.
Tensor ungroup_bias(const Tensor& grouped, int64_t queries, Dtype type) {
  const int64_t heads = grouped.size(0), keys = grouped.size(2);
  const Tensor bias = empty({heads, queries, keys}, grouped.scalar_type());
  with_compute_type(kOp, grouped.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* const from = grouped.const_data_ptr<T>();
    T* const to = bias.mutable_data_ptr<T>();
    const auto kernel = ASVIT_FAST_SELECT(ungroup_queries<T>);
    parallel_for(0, heads, grain_size(kElements, queries * keys), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        kernel(from + head * group_count(queries) * keys * kGroup, queries, keys, to + head * queries * keys);
    });
  });
  return as_type(bias, type);
}

// Operands as the kernels want them.
struct Operands {
  Tensor q;  // with the channels of k and v where these are not maps of their own
  OptionalTensor k, v;
  Tensor padding;
  OptionalTensor bias, attn_scale, head_scale;

  explicit Operands(const Arguments& a)
      : q(map_operand(a.q)),
        padding(a.padding ? as_contiguous(as_type(*a.padding, a.type())) : zeros({3 * a.channels()}, a.type())),
        attn_scale(parameters(a.attn_scale, a.type())),
        head_scale(parameters(a.head_scale, a.type())) {
    if (a.k) k = map_operand(*a.k);
    if (a.v) v = map_operand(*a.v);
    if (a.bias) bias = group_bias(*a.bias, a.type());
  }

  template <typename T>
  WindowAttention<T> problem(const Arguments& a, const Tensor& output, const Tensor& statistics) const {
    return {token_map(q),
            k ? token_map(*k) : token_map(q, a.channels()),
            v ? token_map(*v) : token_map(q, 2 * a.channels()),
            padding.const_data_ptr<T>(),
            pointer_or_null<T>(bias),
            pointer_or_null<T>(attn_scale),
            pointer_or_null<T>(head_scale),
            mutable_token_map(output),
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

std::tuple<Tensor, Tensor> window_attention_cpu(const Tensor& q, const OptionalTensor& k, const OptionalTensor& v,
                                                const OptionalTensor& bias, const OptionalTensor& padding,
                                                const OptionalTensor& attn_scale, const OptionalTensor& head_scale,
                                                int64_t heads, Sizes window, Sizes shift, Sizes kv_window, double scale,
                                                const std::string& layout) {
  const Arguments arguments{q,     k,      v,     bias,      padding, attn_scale,          head_scale,
                            heads, window, shift, kv_window, scale,   parse_layout(layout)};
  check(arguments);
  const Operands operands(arguments);
  const Tensor output = new_empty(map_sizes(arguments, arguments.channels()), q.scalar_type());
  const Tensor statistics = new_empty(statistics_sizes(arguments), arguments.type());
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
  return {output, statistics};
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
Tensor sum_pieces(const OptionalTensor& pieces, const Tensor& q) {
  if (!pieces) return empty({0}, q.scalar_type());
  return pieces->size(0) == 1 ? reshaped(*pieces, pieces->sizes().slice(1)) : sum_first(*pieces);
}

// Gradients of parameters, a slice for each piece, where they are needed.
struct Pieces {
  int64_t count;
  OptionalTensor bias, padding, attn_scale, head_scale;

  Pieces(const Arguments& a, const std::vector<bool>& needs_grad, int64_t windows) {
    const int64_t groups = group_count(a.tokens());
    const int64_t bytes =
        needs_grad[kBias] ? a.heads * groups * kGroup * a.keys() * static_cast<int64_t>(bytes_of(a.type())) : 0;
    count = piece_count(
        windows, needs_grad[kBias] || needs_grad[kPadding] || needs_grad[kAttnScale] || needs_grad[kHeadScale], bytes);
    if (needs_grad[kBias]) bias = zeros({count, a.heads, groups, a.keys(), kGroup}, a.type());
    if (needs_grad[kPadding]) padding = zeros({count, 3 * a.channels()}, a.type());
    if (needs_grad[kAttnScale]) attn_scale = zeros({count, a.heads}, a.type());
    if (needs_grad[kHeadScale]) head_scale = zeros({count, a.heads}, a.type());
  }
};

// Gradients of q, k and v: parts of one fused map, or maps of their own. Where windows of keys overlap, those of k and
// v are of each window, [B * windows, keys, heads * head_dim], zeros at first.
struct MapGradients {
  bool overlap;
  Tensor q;
  OptionalTensor k, v;

  MapGradients(const Arguments& a, int64_t windows)
      : overlap(!a.kv_window.empty()),
        q(new_empty(map_sizes(a, overlap || !a.fused() ? a.channels() : a.q.size(-1)), a.q.scalar_type())) {
    if (overlap) {
      k = zeros({windows, a.keys(), a.channels()}, a.type());
      v = zeros(k->sizes(), a.type());
    } else if (!a.fused()) {
      k = new_empty(q.sizes(), q.scalar_type());
      v = new_empty(q.sizes(), q.scalar_type());
    }
  }

  TokenMap<char> map(int64_t part) const {
    if (part > 0 && overlap) return {};
    if (!k) return mutable_token_map(q, part * (q.size(-1) / 3));
    return mutable_token_map(part == 0 ? q : part == 1 ? *k : *v);
  }

  template <typename T>
  T* window_rows(const OptionalTensor& gradient) const {
    return overlap ? mutable_or_null<T>(gradient) : nullptr;
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

std::vector<Tensor> window_attention_backward_cpu(const Tensor& gradient, const Tensor& output,
                                                  const Tensor& statistics, const Tensor& q, const OptionalTensor& k,
                                                  const OptionalTensor& v, const OptionalTensor& bias,
                                                  const OptionalTensor& padding, const OptionalTensor& attn_scale,
                                                  const OptionalTensor& head_scale, int64_t heads, Sizes window,
                                                  Sizes shift, Sizes kv_window, double scale, const std::string& layout,
                                                  const std::vector<bool>& needs_grad) {
  const Arguments arguments{q,     k,      v,     bias,      padding, attn_scale,          head_scale,
                            heads, window, shift, kv_window, scale,   parse_layout(layout)};
  check(arguments);
  const char* const op = "window_attention_backward";
  check_operand(op, "gradient", gradient, map_sizes(arguments, arguments.channels()), q);
  check_operand(op, "output", output, map_sizes(arguments, arguments.channels()), q);
  check_operand(op, "statistics", statistics, statistics_sizes(arguments), q);
  ASVIT_FAST_CHECK(statistics.scalar_type() == arguments.type(), op, ": statistics must be ", arguments.type(),
                   ", not ", statistics.scalar_type());
  const OptionalTensor* const optional[] = {&k, &v, &bias, &padding, &attn_scale, &head_scale};
  ASVIT_FAST_CHECK(needs_grad.size() == kOperands, op, ": needs_grad must be ", int{kOperands}, " values");
  for (int i = kBias; i < kOperands; ++i)
    ASVIT_FAST_CHECK(!needs_grad[i] || optional[i - 1]->has_value(), op, ": no operand ", i,
                     " to find the gradient of");
  const Operands operands(arguments);
  std::vector<Tensor> found;
  with_compute_type(kOp, arguments.type(), [&](auto zero) {
    using T = decltype(zero);
    const Tensor known = as_contiguous(output), given = map_operand(gradient), rows = as_contiguous(statistics);
    const auto forward = operands.problem<T>(arguments, known, rows);
    const Pieces pieces(arguments, needs_grad, window_count(forward));
    const MapGradients maps(arguments, window_count(forward));
    if (output.numel() > 0)
      run_backward<T>({forward, token_map(given), maps.map(0), maps.map(1), maps.map(2), maps.window_rows<T>(maps.k),
                       maps.window_rows<T>(maps.v), mutable_or_null<T>(pieces.bias), mutable_or_null<T>(pieces.padding),
                       mutable_or_null<T>(pieces.attn_scale), mutable_or_null<T>(pieces.head_scale), pieces.count});
    const Dtype type = q.scalar_type();
    found = {as_type(maps.q, type),
             maps.k ? as_type(*maps.k, type) : empty({0}, type),
             maps.v ? as_type(*maps.v, type) : empty({0}, type),
             sum_pieces(pieces.bias, q),
             sum_pieces(pieces.padding, q),
             sum_pieces(pieces.attn_scale, q),
             sum_pieces(pieces.head_scale, q)};
  });
  if (needs_grad[kBias]) found[kBias] = ungroup_bias(found[kBias], arguments.tokens(), (*bias).scalar_type());
  for (int i = kBias + 1; i < kOperands; ++i)
    if (needs_grad[i]) found[i] = as_type(found[i], (*optional[i - 1])->scalar_type());
  return found;
}

}  // namespace

#define ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS                                                                          \
  "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? padding, Tensor? attn_scale, Tensor? head_scale, int heads, " \
  "int[] window, int[] shift, int[] kv_window, float scale, str layout"

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("window_attention(" ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("window_attention_backward(Tensor gradient, Tensor output, Tensor statistics, "  //
              ASVIT_FAST_WINDOW_ATTENTION_ARGUMENTS ", bool[] needs_grad) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("window_attention", TORCH_BOX(&window_attention_cpu));
  library.impl("window_attention_backward", TORCH_BOX(&window_attention_backward_cpu));
}

}  // namespace asvit_fast
