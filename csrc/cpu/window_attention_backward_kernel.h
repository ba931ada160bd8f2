// The backward pass of windowed attention for one instruction set. With weights p, gradients g of the output, values'
// means M (over the keys that a query may attend) and AttnScale's w, whose output is y = (1 + w) p v - w M,
//
//   dp = g v^T,  ds = p ((1 + w) dp - <g, y> - w <g, M>),  dq = scale ds k,  dk = scale ds^T q,
//   dv = (1 + w) p^T g - w / n sum of g,  dw = sum of p dp - <g, M>.
//
// Weights and gradients of scores of a group of queries and a tile of keys lie [key][query], as in the forward pass,
// and every weight is computed once.
#pragma once

#include "cpu/narrow_rows.h"
#include "cpu/window_attention_kernel.h"

namespace asvit_fast {
namespace {

template <typename T>
inline T dot(const T* a, const T* b, int64_t size) {
  T sum = T(0);
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// One head's output, or gradients of it; zeros for padding, which has none.
template <typename Byte, typename T>
void pack_output(const TokenMap<Byte>& map, const TokenList& tokens, int64_t size, int64_t head, T* to) {
  for (int64_t i = 0; i < tokens.count; ++i, to += size) {
    if (tokens[i].is_padding()) {
      for (int64_t j = 0; j < size; ++j) to[j] = T(0);
    } else {
      read_row(map.at(tokens[i].index, head * size), map.type, size, to);
    }
  }
}

// to [query] = <g, y>. In the order in which dp is summed: where one weight is 1, dp - <g, y> is then exactly 0, and
// not the rounding error of two large numbers.
template <typename T>
void multiply_columns(const T* a, const T* b, int64_t count, int64_t size, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vector<T> sum = {};
    for (int64_t j = 0; j < size; ++j) sum += load<T>(a + j * kGroup + i) * load<T>(b + j * kGroup + i);
    store<T>(to + i, sum);
  }
}

// Statistics of a group of queries from the forward pass; padding gets the weight 0. `products` start with -<g, M>.
template <typename T>
void read_group(const WindowAttention<T>& forward, const TokenWindow& window, int64_t head, int64_t first,
                int64_t count, const BackwardMemory<T>& memory) {
  const int64_t size = forward.head_dim, statistics = map_tokens(forward) * forward.heads;
  T *const output = memory.grad_queries, *const columns = memory.column_sums;  // whose sums begin later
  pack_output(forward.output, {window.queries.data + first, count}, size, head, output);
  transpose_to_columns(output, count, size, T(1), columns);
  multiply_columns(memory.gradient_columns, columns, count, size, memory.delta);
  fill(memory.products, kGroup, T(0));
  for (int64_t i = 0; i < count; ++i) {
    const Token& token = window.queries[first + i];
    if (token.is_padding()) {
      memory.maximum[i] = -kLowest<T>;
      memory.inverse[i] = T(0);
      continue;
    }
    const int64_t row = token.index * forward.heads + head;
    memory.maximum[i] = forward.statistics[row];
    memory.inverse[i] = forward.statistics[statistics + row];
    if (!forward.attn_scale) continue;
    const T mean = dot(memory.gradients + (first + i) * size, memory.means + token.region * memory.padded_dim, size);
    memory.delta[i] += forward.attn_scale[head] * mean;
    memory.products[i] = -mean;
  }
}

// Scores and dp of a group and a tile to weights and gradients of scores; p dp is added to `products`.
template <typename T>
void differentiate_tile(T attn_factor, int64_t count, int64_t keys, const BackwardMemory<T>& memory) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vector<T> most = load<T>(memory.maximum + i), inverse = load<T>(memory.inverse + i);
    const Vector<T> delta = load<T>(memory.delta + i);
    Vector<T> sum = {};  // of this tile: rounding errors grow with the length of a sum
    for (int64_t key = 0; key < keys; ++key) {
      T *weights = memory.weights + key * kGroup + i, *scores = memory.scores + key * kGroup + i;
      const Vector<T> p = weight_of(load<T>(weights) - most) * inverse, dp = load<T>(scores);
      sum += p * dp;
      store<T>(weights, p);
      store<T>(scores, p * (attn_factor * dp - delta));
    }
    store<T>(memory.products + i, load<T>(memory.products + i) + sum);
  }
}

// Gradients of scores [key][kGroup queries] of a group of queries and a tile of keys, to those of one head's bias.
template <typename T>
void add_bias_gradient(const WindowAttention<T>& forward, const TokenWindow& window, int64_t first, int64_t count,
                       int64_t key, int64_t keys, const BackwardMemory<T>& memory, T* grad_bias) {
  const int64_t group = first / kGroup * window_keys(forward) * kGroup;
  for (int64_t i = 0; i < keys; ++i) {
    const T* from = memory.scores + i * kGroup;
    T* to = grad_bias + window.keys[key + i].place * kGroup;
    for (int64_t j = 0; j < count && window.complete; j += kLanes<T>)
      store<T>(to + group + j, load<T>(to + group + j) + load<T>(from + j));
    for (int64_t j = 0; j < count && !window.complete; ++j) to[memory.bias_places[j]] += from[j];
  }
}

// Gradients of one head's queries (part 0), keys (1) or values (2) are written to `map`, or, where windows overlap, to
// `window_rows` [windows, keys of a window, heads, head_dim].
template <typename T>
struct GradientRows {
  int part;
  TokenList tokens;
  TokenMap<char> map;
  T* window_rows;
};

// factor * sums [token][padded_dim] less shares [region][padded_dim], to the gradients of the tokens; what padding
// gets, to the gradient of padding.
template <typename T>
void write_gradient(const WindowAttentionBackward<T>& problem, const TokenWindow& window, int64_t task,
                    const GradientRows<T>& rows, T factor, const T* shares, int64_t padded_dim, T* sums) {
  const WindowAttention<T>& forward = problem.forward;
  const int64_t size = forward.head_dim, heads = forward.heads, head = task % heads;
  T* padding = problem.grad_pad_token ? problem.grad_pad_token + ((task / heads * 3 + rows.part) * heads + head) * size
                                      : nullptr;
  for (int64_t i = 0; i < rows.tokens.count; ++i, sums += padded_dim) {
    const Token& token = rows.tokens[i];
    for (int64_t j = 0; j < size; j += kLanes<T>) {
      Vector<T> value = factor * load<T>(sums + j);
      if (shares) value -= load<T>(shares + token.region * padded_dim + j);
      store<T>(sums + j, value);
    }
    if (token.is_padding()) {
      for (int64_t j = 0; j < size && padding; ++j) padding[j] += sums[j];
    } else if (rows.window_rows) {
      convert_row(sums, size,
                  rows.window_rows + ((window.index * window_keys(forward) + token.place) * heads + head) * size);
    } else {
      write_row(sums, size, rows.map.type, rows.map.at(token.index, head * size));
    }
  }
}

// Scores [key][query] of a group and a tile.
template <typename T>
void score_tile(const T* keys, const T* columns, int64_t head_dim, int64_t count, int64_t key_count, const T* base,
                T* scores) {
  multiply<T>({keys, head_dim, 1, columns, kGroup, base, kGroup, scores, kGroup}, key_count, count, head_dim);
}

// to [key][padded_dim] += factors [key][kGroup queries] * vectors [queries / in_vector][component][in_vector]: sums
// that remain to be added side by side.
template <int in_vector, typename T>
void add_narrow_products(const T* factors, const T* vectors, int64_t count, int64_t keys, bool more, int64_t padded_dim,
                         T* to) {
  using Operand = Neighbours<T, in_vector>;
  multiply<T, Operand>(
      {reinterpret_cast<const Operand*>(factors), kGroup / in_vector, 1, reinterpret_cast<const Operand*>(vectors),
       kLanes<T> / in_vector, more ? to : nullptr, padded_dim, to, padded_dim},
      keys, kLanes<T>, (count + in_vector - 1) / in_vector);
}

// A group of queries against a tile of keys: what they give to the gradients of keys and values.
template <int in_vector, typename T>
void add_key_products(int64_t size, int64_t first, int64_t count, int64_t key, int64_t keys,
                      const BackwardMemory<T>& memory) {
  const int64_t padded_dim = memory.padded_dim;
  T *grad_keys = memory.grad_keys + key * padded_dim, *grad_values = memory.grad_values + key * padded_dim;
  const bool more = first > 0;
  if constexpr (in_vector > 1) {
    for (int64_t query = count; query % in_vector != 0; ++query)
      for (int64_t i = 0; i < keys; ++i)
        memory.scores[i * kGroup + query] = memory.weights[i * kGroup + query] = T(0);  // not a number, or not its own
    add_narrow_products<in_vector>(memory.scores, memory.query_vectors, count, keys, more, padded_dim, grad_keys);
    add_narrow_products<in_vector>(memory.weights, memory.gradient_vectors, count, keys, more, padded_dim, grad_values);
  } else {
    multiply<T>({memory.scores, kGroup, 1, memory.queries + first * size, size, more ? grad_keys : nullptr, padded_dim,
                 grad_keys, padded_dim},
                keys, size, count);
    multiply<T>({memory.weights, kGroup, 1, memory.gradients + first * size, size, more ? grad_values : nullptr,
                 padded_dim, grad_values, padded_dim},
                keys, size, count);
  }
}

// The same for the gradients of queries.
template <typename T>
void add_query_products(int64_t size, bool components, int64_t count, int64_t key, int64_t keys,
                        const BackwardMemory<T>& memory) {
  const int64_t padded_dim = memory.padded_dim;
  const T* key_rows = memory.keys + key * size;
  if (components) {
    multiply<T>({memory.scores, 1, kGroup, key_rows, size, key > 0 ? memory.grad_queries : nullptr, padded_dim,
                 memory.grad_queries, padded_dim},
                count, size, keys);
  } else {
    multiply<T>({key_rows, 1, size, memory.scores, kGroup, key > 0 ? memory.column_sums : nullptr, kGroup,
                 memory.column_sums, kGroup},
                size, count, keys);
  }
}

// The next window and head: what they read and write is prefetched during the computation.
template <typename T>
struct NextWindowBackward {
  const WindowAttentionBackward<T>& problem;
  const TokenWindow& window;
  int64_t head;

  [[gnu::always_inline]] void prefetch_operands() const {
    const WindowAttention<T>& forward = problem.forward;
    prefetch_head<0>(forward.q, window.queries);
    prefetch_head<0>(forward.k, window.keys);
    prefetch_head<0>(forward.v, window.keys);
  }

  [[gnu::always_inline]] void prefetch_outputs() const {
    const WindowAttention<T>& forward = problem.forward;
    prefetch_head<0>(problem.gradient, window.queries);
    prefetch_head<0>(forward.output, window.queries);
  }

  [[gnu::always_inline]] void prefetch_gradients() const {
    prefetch_head<1>(problem.grad_q, window.queries);
    if (problem.window_grad_k) return;
    prefetch_head<1>(problem.grad_k, window.keys);
    prefetch_head<1>(problem.grad_v, window.keys);
  }

  template <int write, typename Byte>
  [[gnu::always_inline]] void prefetch_head(const TokenMap<Byte>& map, const TokenList& tokens) const {
    const int64_t size = problem.forward.head_dim;
    prefetch<write>(map, tokens, 0, tokens.count, head * size, size);
  }
};

// The sum of the products of rows [token][size] and [token][padded_dim].
template <typename T>
T sum_products(const T* rows, const T* padded_rows, int64_t count, int64_t size, int64_t padded_dim) {
  double sum = 0.;
  for (int64_t i = 0; i < count; ++i) sum += dot(rows + i * size, padded_rows + i * padded_dim, size);
  return static_cast<T>(sum);
}

// A group of queries against all keys of their window.
template <int in_vector, typename T>
void differentiate_group(const WindowAttentionBackward<T>& problem, const TokenWindow& window, int64_t task,
                         int64_t first, int64_t count, const NextWindowBackward<T>& next,
                         const BackwardMemory<T>& memory) {
  const WindowAttention<T>& forward = problem.forward;
  const int64_t size = forward.head_dim, head = task % forward.heads, tokens = window_tokens(forward);
  const bool components = lanes_are_components<T>(tokens, size);
  const T factor = head_factor(forward, head);
  transpose_to_columns(memory.queries + first * size, count, size, factor, memory.query_columns);
  prepare_group(forward, window, first, count, memory);
  transpose_to_columns(memory.gradients + first * size, count, size, T(1), memory.gradient_columns);
  if constexpr (in_vector > 1) {
    pack_side_by_side<in_vector>(memory.queries + first * size, count, size, memory.query_vectors);
    pack_side_by_side<in_vector>(memory.gradients + first * size, count, size, memory.gradient_vectors);
  }
  read_group(forward, window, head, first, count, memory);
  for (int64_t key = 0; key < window.keys.count; key += kKeyTile) {
    const int64_t keys = window.keys.count - key < kKeyTile ? window.keys.count - key : kKeyTile;
    const T* base = score_base(forward, window, head, first, count, key, keys, memory);
    score_tile(memory.keys + key * size, memory.query_columns, size, count, keys, base, memory.weights);
    if (first + key == 0) next.prefetch_operands();
    score_tile<T>(memory.values + key * size, memory.gradient_columns, size, count, keys, nullptr, memory.scores);
    if (first + key == 0) next.prefetch_outputs();
    differentiate_tile(T(1) + (forward.attn_scale ? forward.attn_scale[head] : T(0)), count, keys, memory);
    add_query_products(size, components, count, key, keys, memory);
    add_key_products<in_vector>(size, first, count, key, keys, memory);
    if (first + key == 0) next.prefetch_gradients();
    if (problem.grad_bias)
      add_bias_gradient(forward, window, first, count, key, keys, memory,
                        problem.grad_bias + task * group_count(tokens) * window_keys(forward) * kGroup);
  }
  if (!components) transpose_to_rows(memory.column_sums, count, size, memory.padded_dim, memory.grad_queries);
  if (problem.grad_head_scale)
    problem.grad_head_scale[task] += forward.scale * sum_products(memory.queries + first * size, memory.grad_queries,
                                                                  count, size, memory.padded_dim);
  write_gradient<T>(problem, window, task, {0, {window.queries.data + first, count}, problem.grad_q, nullptr}, factor,
                    nullptr, memory.padded_dim, memory.grad_queries);
  if (!problem.grad_attn_scale) return;
  double sum = 0.;
  for (int64_t i = 0; i < count; ++i) sum += memory.products[i];
  problem.grad_attn_scale[task] += static_cast<T>(sum);
}

template <int in_vector, typename T>
void differentiate_window_by(const WindowAttentionBackward<T>& problem, const TokenWindow& window, int64_t task,
                             const NextWindowBackward<T>& next, const BackwardMemory<T>& memory) {
  const WindowAttention<T>& forward = problem.forward;
  const int64_t size = forward.head_dim, padded_dim = memory.padded_dim, head = task % forward.heads;
  const T attn_scale = forward.attn_scale ? forward.attn_scale[head] : T(0);
  pack_qkv(forward, window, head, memory.queries, memory.keys, memory.values);
  pack_output(problem.gradient, window.queries, size, head, memory.gradients);
  if (forward.attn_scale) mean_regions(window, window.keys, memory.values, size, padded_dim, T(1), memory.means);
  for (int64_t first = 0; first < window.queries.count; first += kGroup)
    differentiate_group<in_vector>(problem, window, task, first,
                                   window.queries.count - first < kGroup ? window.queries.count - first : kGroup, next,
                                   memory);
  sum_rows_side_by_side<in_vector>(window.keys.count, padded_dim, memory.grad_keys);
  sum_rows_side_by_side<in_vector>(window.keys.count, padded_dim, memory.grad_values);
  write_gradient<T>(problem, window, task, {1, window.keys, problem.grad_k, problem.window_grad_k},
                    head_factor(forward, head), nullptr, padded_dim, memory.grad_keys);
  if (forward.attn_scale)
    mean_regions(window, window.queries, memory.gradients, size, padded_dim, attn_scale, memory.means);
  write_gradient<T>(problem, window, task, {2, window.keys, problem.grad_v, problem.window_grad_v}, T(1) + attn_scale,
                    forward.attn_scale ? memory.means : nullptr, padded_dim, memory.grad_values);
}

template <typename T>
void differentiate_window(const WindowAttentionBackward<T>& problem, const TokenWindow& window, int64_t task,
                          const NextWindowBackward<T>& next, const BackwardMemory<T>& memory) {
  with_rows_in_vector<T>(problem.forward.head_dim, [&](auto in_vector) {
    differentiate_window_by<in_vector()>(problem, window, task, next, memory);
  });
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void window_attention_backward(const WindowAttentionBackward<T>& problem, int64_t begin, int64_t end, char* bytes) {
  Arena arena(bytes);
  const WindowAttention<T>& forward = problem.forward;
  const BackwardMemory<T> memory(forward, arena);
  Windows<T> windows(forward, memory.tokens);
  const int64_t count = window_count(forward);
  const auto first_of = [&](int64_t task) { return count * (task / forward.heads) / problem.pieces; };
  for (int64_t task = begin; task < end; ++task) {
    const int64_t last = first_of(task + forward.heads) - 1;
    for (int64_t index = first_of(task); index <= last; ++index) {
      const int64_t following_task = index < last || task + 1 == end ? task : task + 1;
      const int64_t following = index < last ? index + 1 : first_of(following_task);
      const TokenWindow& window = windows.at(index);
      const TokenWindow& next = windows.next(index, following);
      differentiate_window<T>(problem, window, task, {problem, next, following_task % forward.heads}, memory);
    }
  }
}

template void window_attention_backward(const WindowAttentionBackward<float>&, int64_t, int64_t, char*);
template void window_attention_backward(const WindowAttentionBackward<double>&, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
