// The backward pass of windowed attention for one instruction set. With weights p = exp(s - maximum) / sum and
// gradients g of the output y,
//
//   dp = g v^T,  ds = p (dp - <g, y>),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T g.
//
// Lanes are queries as in the forward pass, whose blocks of scores and sums serve here too: p and ds of a tile of keys
// are found as scores are, dq as the weighted sums are. For dk and dv the tile is transposed in registers, so that the
// lanes are keys: still nothing is summed across lanes, and every weight is computed once.
#pragma once

#include "cpu/window_attention_taylor_kernel.h"
#include "window_attention.h"

namespace asvit_fast {
namespace {

constexpr int kQueryVectors = kWide ? 2 : 4;
template <typename T>
constexpr int kQueryGroup = kQueryVectors * kLanes<T>;

// Weights and gradients of scores of a group of queries and a tile of keys, lanes along the keys.
template <typename T>
struct alignas(64) TransposedTiles {
  T weights[kTile / kLanes<T>][kQueryGroup<T>][1][kLanes<T>];
  T scores[kTile / kLanes<T>][kQueryGroup<T>][1][kLanes<T>];
};

// One window's operands, as PackedWindow has them, and sums.
template <typename T>
struct BackwardWindow {
  T *keys, *values;                          // [key][component]
  T *key_rows, *query_rows, *gradient_rows;  // [component block][token][component in the block]
  T *to_keys, *to_values;                    // [vector of keys][component][lane]
  T *queries, *gradients, *to_queries;       // [vector of queries][component][lane]
  int64_t padded_dim;

  BackwardWindow(const WindowAttentionTaylor<T>& problem, T* workspace) {
    const AttentionBackwardWorkspace sizes(problem);
    padded_dim = sizes.padded_dim;
    keys = workspace;
    values = keys + sizes.packed;
    key_rows = values + sizes.packed;
    query_rows = key_rows + sizes.rows;
    gradient_rows = query_rows + sizes.rows;
    to_keys = gradient_rows + sizes.rows;
    to_values = to_keys + sizes.sums;
    queries = to_values + sizes.sums;
    gradients = queries + sizes.group;
    to_queries = gradients + sizes.group;
  }

  int64_t vector(int64_t index) const { return index * padded_dim * kLanes<T>; }
};

template <typename T>
inline WindowAttentionTaylor<T> with_operand(WindowAttentionTaylor<T> problem, const AttentionOperand<T>& operand) {
  problem.q = problem.k = problem.v = operand;
  problem.scale = T(1);
  return problem;
}

template <typename T>
void pack_window(const WindowAttentionBackward<T>& problem, const AttentionWindow& window,
                 const BackwardWindow<T>& packed) {
  const WindowAttentionTaylor<T>& forward = problem.forward;
  pack_keys<T, 0>(forward, window, packed.keys);
  pack_keys<T, 0>(with_operand(forward, forward.v), window, packed.values);
  pack_values<T, 0>(with_operand(forward, forward.k), window, packed.padded_dim, packed.key_rows);
  pack_values<T, 0>(with_operand(forward, forward.q), window, packed.padded_dim, packed.query_rows);
  pack_values<T, 0>(with_operand(forward, problem.gradient), window, packed.padded_dim, packed.gradient_rows);
  const int64_t vectors = (window.tokens() + kLanes<T> - 1) / kLanes<T>;
  for (int64_t i = 0; i < vectors * packed.padded_dim; ++i) {
    store<T>(packed.to_keys + i * kLanes<T>, Vector<T>{});
    store<T>(packed.to_values + i * kLanes<T>, Vector<T>{});
  }
}

// What a vector of queries knows from the forward pass; lanes beyond the window's last query have the weight 0.
template <typename T>
struct RowState {
  Vector<T> maximum, inverse, mean;  // largest score, 1 / sum of weights, <g, y>
};

// `gradients` and `outputs`: [component][lane] of the queries.
template <typename T>
RowState<T> row_state(const WindowAttentionTaylor<T>& forward, const AttentionWindow& window, int64_t query,
                      int64_t count, const T* gradients, const T* outputs) {
  const AttentionStrides strides = output_strides(forward);
  const int64_t rows = forward.batch * forward.rows.size * forward.columns.size * forward.heads;
  RowState<T> state = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    const T* from = forward.statistics + token_offset(window, strides, query + lane) / forward.head_dim;
    state.maximum[lane] = from[0];
    state.inverse[lane] = from[rows];
  }
  for (int64_t i = 0; i < forward.head_dim; ++i)
    state.mean += load<T>(gradients + i * kLanes<T>) * load<T>(outputs + i * kLanes<T>);
  return state;
}

// One vector of queries against one tile of keys: weights and gradients of scores [key][lane].
template <typename T>
void differentiate_tile(const WindowAttentionTaylor<T>& forward, const AttentionWindow& window,
                        const BackwardWindow<T>& packed, int64_t vector, int64_t query, int64_t queries, int64_t key,
                        int64_t keys, const RowState<T>& state, ScoreTile<T, 0>& weights, ScoreTile<T, 0>& scores) {
  for (int64_t block = 0; block < keys; block += kKeyBlock) {
    const int64_t offset = (key + block) * forward.head_dim;
    score_block<T, 0>(packed.queries + packed.vector(vector), packed.keys + offset, forward.head_dim,
                      weights.rows + block);
    score_block<T, 0>(packed.gradients + packed.vector(vector), packed.values + offset, forward.head_dim,
                      scores.rows + block);
  }
  if (forward.bias) add_bias(forward, window, query, queries, key, keys, weights);
  for (int64_t i = 0; i < keys; ++i) {
    const Vector<T> p = exp_negative<T>(load<T>(weights.rows[i][0]) - state.maximum) * state.inverse;
    store<T>(weights.rows[i][0], p);
    store<T>(scores.rows[i][0], p * (load<T>(scores.rows[i][0]) - state.mean));
  }
  for (int64_t i = keys; i % kLanes<T>; ++i) {  // whole vectors of keys are transposed
    store<T>(weights.rows[i][0], Vector<T>{});
    store<T>(scores.rows[i][0], Vector<T>{});
  }
}

// rows [key][lane of queries] to columns [vector of keys][query][lane of keys], of which the queries from `first` on.
template <typename T>
inline void transpose_tile(const ScoreTile<T, 0>& tile, int64_t keys, int64_t first,
                           T (*columns)[kQueryGroup<T>][1][kLanes<T>]) {
  for (int64_t key = 0; key < keys; key += kLanes<T>) {
    Vector<T> rows[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = load<T>(tile.rows[key + i][0]);
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) store<T>(columns[key / kLanes<T>][first + i][0], rows[i]);
  }
}

template <typename T>
void add_bias_gradient(const WindowAttentionTaylor<T>& forward, const AttentionWindow& window, int64_t query,
                       int64_t queries, int64_t key, int64_t keys, const TransposedTiles<T>& tiles, T* to_bias) {
  const int64_t columns = forward.columns.window, tokens = forward.rows.window * columns;
  const bool whole = is_whole(forward, window);
  for (int64_t row = 0; row < queries; ++row) {
    T* to = to_bias + token_in_window(window, columns, query + row) * tokens;
    if (!whole) {
      for (int64_t i = 0; i < keys; ++i)
        to[token_in_window(window, columns, key + i)] += tiles.scores[i / kLanes<T>][row][0][i % kLanes<T>];
      continue;
    }
    in_widths<T>(keys, [&](int64_t i, auto width) {
      Vector<T> sum = {}, more = {};
      std::memcpy(&sum, to + key + i, width() * sizeof(T));
      std::memcpy(&more, &tiles.scores[i / kLanes<T>][row][0][i % kLanes<T>], width() * sizeof(T));
      sum += more;
      std::memcpy(to + key + i, &sum, width() * sizeof(T));
    });
  }
}

// factor * sums [vector][component][lane] to the tokens first <= i < first + count.
template <typename T>
void write_gradient(const AttentionWindow& window, const AttentionStrides& strides, int64_t head_dim,
                    int64_t padded_dim, int64_t first, int64_t count, T factor, T* sums, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    for (int64_t component = 0; component < head_dim; ++component)
      store<T>(sums + component * kLanes<T>, factor * load<T>(sums + component * kLanes<T>));
    write_lanes(window, strides, first + i, count - i < kLanes<T> ? count - i : kLanes<T>, head_dim, sums, 1, to);
    sums += padded_dim * kLanes<T>;
  }
}

// A group of queries against all keys of their window.
template <typename T>
void differentiate_group(const WindowAttentionBackward<T>& problem, const AttentionWindow& window,
                         const BackwardWindow<T>& packed, int64_t first, int64_t count, T* to_bias) {
  const WindowAttentionTaylor<T>& forward = problem.forward;
  const WindowAttentionTaylor<T> gradients = with_operand(forward, problem.gradient);
  const WindowAttentionTaylor<T> outputs = with_operand(forward, {forward.output, output_strides(forward)});
  const int64_t tokens = window.tokens(), vectors = (count + kLanes<T> - 1) / kLanes<T>;
  const auto lanes_of = [count](int64_t vector) {
    return count - vector * kLanes<T> < kLanes<T> ? count - vector * kLanes<T> : kLanes<T>;
  };
  const Vector<T> one = broadcast<T>(T(1));
  RowState<T> states[kQueryVectors];
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const int64_t query = first + vector * kLanes<T>, queries = lanes_of(vector), at = packed.vector(vector);
    pack_queries<T, 0>(forward, window, query, queries, packed.queries + at);
    pack_queries<T, 0>(gradients, window, query, queries, packed.gradients + at);
    pack_queries<T, 0>(outputs, window, query, queries, packed.to_queries + at);
    states[vector] = row_state(forward, window, query, queries, packed.gradients + at, packed.to_queries + at);
    for (int64_t i = 0; i < packed.padded_dim; ++i) store<T>(packed.to_queries + at + i * kLanes<T>, Vector<T>{});
  }
  ScoreTile<T, 0> weights, scores;
  TransposedTiles<T> tiles;
  for (int64_t key = 0; key < tokens; key += kTile) {
    const int64_t keys = tokens - key < kTile ? tokens - key : kTile;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      differentiate_tile(forward, window, packed, vector, first + vector * kLanes<T>, lanes_of(vector), key, keys,
                         states[vector], weights, scores);
      accumulate_rows<T, 0>(scores.rows, keys, packed.key_rows, tokens, key, packed.padded_dim, &one,
                            packed.to_queries + packed.vector(vector));
      transpose_tile<T>(weights, keys, vector * kLanes<T>, tiles.weights);
      transpose_tile<T>(scores, keys, vector * kLanes<T>, tiles.scores);
    }
    for (int64_t i = 0; i * kLanes<T> < keys; ++i) {
      const int64_t at = packed.vector(key / kLanes<T> + i);
      accumulate_rows<T, 0>(tiles.weights[i], count, packed.gradient_rows, tokens, first, packed.padded_dim, &one,
                            packed.to_values + at);
      accumulate_rows<T, 0>(tiles.scores[i], count, packed.query_rows, tokens, first, packed.padded_dim, &one,
                            packed.to_keys + at);
    }
    if (to_bias) add_bias_gradient(forward, window, first, count, key, keys, tiles, to_bias);
  }
  write_gradient(window, problem.to_strides, forward.head_dim, packed.padded_dim, first, count, forward.scale,
                 packed.to_queries, problem.to_q);
}

template <typename T>
void differentiate_window(const WindowAttentionBackward<T>& problem, const AttentionWindow& window,
                          const BackwardWindow<T>& packed, T* to_bias) {
  const WindowAttentionTaylor<T>& forward = problem.forward;
  const int64_t tokens = window.tokens();
  pack_window(problem, window, packed);
  for (int64_t first = 0; first < tokens; first += kQueryGroup<T>)
    differentiate_group(problem, window, packed, first,
                        tokens - first < kQueryGroup<T> ? tokens - first : kQueryGroup<T>, to_bias);
  write_gradient(window, problem.to_strides, forward.head_dim, packed.padded_dim, 0, tokens, forward.scale,
                 packed.to_keys, problem.to_k);
  write_gradient(window, problem.to_strides, forward.head_dim, packed.padded_dim, 0, tokens, T(1), packed.to_values,
                 problem.to_v);
}

template <typename T>
void window_attention_backward(const WindowAttentionBackward<T>& problem, int64_t begin, int64_t end, T* workspace) {
  static_assert(kQueryGroup<T> <= kMaximumQueryGroup, "the workspace holds one group");
  const WindowAttentionTaylor<T>& forward = problem.forward;
  const BackwardWindow<T> packed(forward, workspace);
  const int64_t windows = window_count(forward) / forward.heads;
  const int64_t tokens = forward.rows.window * forward.columns.window;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % forward.heads, piece = task / forward.heads;
    T* to_bias = problem.to_bias ? problem.to_bias + task * tokens * tokens : nullptr;
    for (int64_t index = windows * piece / problem.pieces; index < windows * (piece + 1) / problem.pieces; ++index)
      differentiate_window(problem, window_at(forward, index * forward.heads + head), packed, to_bias);
  }
}

}  // namespace
}  // namespace asvit_fast

// The two entry points, for the namespace of the instruction set.
#define ASVIT_FAST_WINDOW_ATTENTION_KERNELS                                                                      \
  void window_attention_backward_f32(const WindowAttentionBackward<float>& problem, int64_t begin, int64_t end,  \
                                     float* workspace) {                                                         \
    window_attention_backward(problem, begin, end, workspace);                                                   \
  }                                                                                                              \
  void window_attention_backward_f64(const WindowAttentionBackward<double>& problem, int64_t begin, int64_t end, \
                                     double* workspace) {                                                        \
    window_attention_backward(problem, begin, end, workspace);                                                   \
  }
