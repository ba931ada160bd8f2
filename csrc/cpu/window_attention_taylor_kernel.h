// Windowed attention on series for one instruction set. The lanes of a vector are queries, so that a row's maximum, sum
// and reference are vectors, keys and values are broadcast from memory, and nothing is ever summed across lanes.
//
// A vector of queries meets the keys in tiles: scores of the tile (register block: one vector of queries x kKeyBlock
// keys, the loop over head_dim inside), weights, then sums of weighted values (register block: kValueBlock components,
// the loop over keys inside). A tile stays in L1; keys and values of a window, repacked once in the order in which they
// are read, in L1 or L2.
#pragma once

#include "attention_series.h"
#include "cpu/transpose.h"
#include "cpu/vector.h"
#include "window_attention_taylor.h"

namespace asvit_fast {
namespace {

constexpr bool kWide = ASVIT_FAST_VECTOR_BYTES == 64;  // 32 registers, operands broadcast from memory
constexpr int kTile = 64;                              // keys
constexpr int kKeyBlock = kWide ? 8 : 4;               // divides kTile
constexpr int kValueBlock = kWide ? 8 : 4;
constexpr int kValueRemainder = 4;  // head_dim is padded to a multiple of it

// Vectors of one tile: scores [key][order], which become weights.
template <typename T, int orders>
struct alignas(64) ScoreTile {
  T rows[kTile][orders + 1][kLanes<T>];
};

// Derivatives to Taylor coefficients.
template <typename T>
inline T coefficient(int order, T derivative) {
  return order == 2 ? T(0.5) * derivative : derivative;
}

template <typename T, int orders>
void pack_keys(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, T* packed) {
  const AttentionStrides strides = problem.k.strides;
  const int64_t tokens = window.tokens(), head_dim = problem.head_dim;
  for (int64_t token = 0; token < tokens; ++token) {
    const T* from = problem.k.data + token_offset(window, strides, token);
    if (orders == 0 && strides.component == 1) {
      for_each_width<T>(head_dim,
                        [&](int64_t i, auto width) { std::memcpy(packed + i, from + i, width() * sizeof(T)); });
      packed += head_dim;
      continue;
    }
    for (int64_t i = 0; i < head_dim; ++i)
      for (int order = 0; order <= orders; ++order)
        *packed++ = coefficient(order, from[order * strides.order + i * strides.component]);
  }
  for (int64_t token = tokens; token % kKeyBlock; ++token)
    for (int64_t i = 0; i < head_dim * (orders + 1); ++i) *packed++ = T(0);
}

template <typename T, int orders>
void pack_values(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, int64_t padded_dim,
                 T* packed) {
  const AttentionStrides strides = problem.v.strides;
  const int64_t tokens = window.tokens(), head_dim = problem.head_dim;
  for (int64_t begin = 0; begin < padded_dim; begin += kValueBlock) {
    const int64_t width = padded_dim - begin < kValueBlock ? padded_dim - begin : kValueBlock;
    for (int64_t token = 0; token < tokens; ++token) {
      const T* from = problem.v.data + token_offset(window, strides, token) + begin * strides.component;
      if (orders == 0 && strides.component == 1 && begin + kValueBlock <= head_dim) {
        std::memcpy(packed, from, kValueBlock * sizeof(T));
        packed += kValueBlock;
        continue;
      }
      for (int order = 0; order <= orders; ++order)
        for (int64_t i = 0; i < width; ++i)
          *packed++ =
              begin + i < head_dim ? coefficient(order, from[order * strides.order + i * strides.component]) : T(0);
    }
  }
}

// Queries first <= i < first + count of the window, scaled; lanes beyond get zeros.
template <typename T, int orders>
void pack_queries(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, int64_t first, int64_t count,
                  T* packed) {
  const AttentionStrides strides = problem.q.strides;
  const T* rows[kLanes<T>];
  for (int64_t lane = 0; lane < count; ++lane)
    rows[lane] = problem.q.data + token_offset(window, strides, first + lane);
  for (int order = 0; order <= orders; ++order) {
    const T factor = coefficient(order, problem.scale);
    const auto to = [&](int64_t i) { return packed + (i * (orders + 1) + order) * kLanes<T>; };
    const auto block = [&](int64_t i, auto width) {
      Vector<T> lanes[kLanes<T>] = {};
      for (int64_t lane = 0; lane < count; ++lane)
        std::memcpy(&lanes[lane], rows[lane] + order * strides.order + i, width() * sizeof(T));
      transpose<T>(lanes);
#pragma GCC unroll 16
      for (int j = 0; j < width(); ++j) store<T>(to(i + j), factor * lanes[j]);
    };
    const auto single = [&](int64_t i) {
      Vector<T> lanes = {};
      for (int64_t lane = 0; lane < count; ++lane)
        lanes[lane] = rows[lane][order * strides.order + i * strides.component];
      store<T>(to(i), factor * lanes);
    };
    if (strides.component != 1) {
      for (int64_t i = 0; i < problem.head_dim; ++i) single(i);
      continue;
    }
    for_each_width<T>(problem.head_dim, [&](int64_t i, auto width) {
      if constexpr (width() == 1) {
        single(i);
      } else {
        block(i, width);
      }
    });
  }
}

// scores [kKeyBlock][orders + 1][lanes] of one block of keys
template <typename T, int orders>
inline void score_block(const T* queries, const T* keys, int64_t head_dim, T (*scores)[orders + 1][kLanes<T>]) {
  const int64_t row = head_dim * (orders + 1);
  Vector<T> s[kKeyBlock][orders + 1] = {};
  for (int64_t i = 0; i < head_dim; ++i) {
    Vector<T> q[orders + 1];
#pragma GCC unroll 3
    for (int order = 0; order <= orders; ++order) q[order] = load<T>(queries + order * kLanes<T>);
#pragma GCC unroll 8
    for (int key = 0; key < kKeyBlock; ++key) {
      T k[orders + 1];
#pragma GCC unroll 3
      for (int order = 0; order <= orders; ++order) k[order] = keys[key * row + order];
      add_product<orders>(s[key], q, k);
    }
    queries += (orders + 1) * kLanes<T>;
    keys += orders + 1;
  }
#pragma GCC unroll 8
  for (int key = 0; key < kKeyBlock; ++key)
#pragma GCC unroll 3
    for (int order = 0; order <= orders; ++order) store<T>(scores[key][order], s[key][order]);
}

// Whether the tokens of a window count as those of the bias do.
template <typename T>
inline bool is_complete(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window) {
  return window.rows.length == problem.rows.window && window.columns.length == problem.columns.window;
}

template <typename T, int orders>
void add_bias(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, int64_t query, int64_t queries,
              int64_t key, int64_t keys, ScoreTile<T, orders>& tile) {
  const int64_t columns = problem.columns.window, tokens = problem.rows.window * columns;
  const T* rows[kLanes<T>];
  for (int64_t lane = 0; lane < queries; ++lane)
    rows[lane] = problem.bias + (window.head * tokens + token_in_window(window, columns, query + lane)) * tokens;
  if (!is_complete(problem, window)) {
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t place = token_in_window(window, columns, key + i);
      for (int64_t lane = 0; lane < queries; ++lane) tile.rows[i][0][lane] += rows[lane][place];
    }
    return;
  }
  for_each_width<T>(keys, [&](int64_t i, auto width) {
    Vector<T> lanes[kLanes<T>] = {};  // of keys, then of queries
    for (int64_t lane = 0; lane < queries; ++lane) {
      if constexpr (width() > 1) {
        std::memcpy(&lanes[lane], rows[lane] + key + i, width() * sizeof(T));
      } else {
        lanes[0][lane] = rows[lane][key + i];
      }
    }
    if constexpr (width() > 1) transpose<T>(lanes);
#pragma GCC unroll 16
    for (int j = 0; j < width(); ++j) store<T>(tile.rows[i + j][0], load<T>(tile.rows[i + j][0]) + lanes[j]);
  });
}

// Scores of a tile to weights; `factor` is what sums over earlier tiles are to be multiplied with.
template <typename T, int orders>
inline void online_softmax_step(ScoreTile<T, orders>& tile, int64_t keys, SoftmaxState<orders, Vector<T>>& state,
                                Vector<T>* factor) {
  const Vector<T> before = state.reference[0];
  Vector<T> maximum = before;
  for (int64_t key = 0; key < keys; ++key) {
    const Vector<T> s = load<T>(tile.rows[key][0]);
    maximum = s > maximum ? s : maximum;
  }
  state.reference[0] = maximum;
  Vector<T> weights = {}, first = {}, second = {};
  for (int64_t key = 0; key < keys; ++key) {
    const Vector<T> p = exp_negative<T>(load<T>(tile.rows[key][0]) - maximum);
    store<T>(tile.rows[key][0], p);
    weights += p;
    if constexpr (orders >= 1) first += p * load<T>(tile.rows[key][1]);
    if constexpr (orders >= 2) second += p * load<T>(tile.rows[key][2]);
  }
  const Vector<T> decay = exp_negative<T>(before - maximum);
  rescale_state<T, orders>(state, decay, T(1) / next_total<T>(state, decay, weights), first, second, factor);
  state.total[0] += weights;
  if constexpr (orders >= 1) {
    Vector<T> sum[orders + 1] = {};
    for (int64_t key = 0; key < keys; ++key) {
      Vector<T> x[orders + 1];
#pragma GCC unroll 3
      for (int order = 1; order <= orders; ++order) x[order] = load<T>(tile.rows[key][order]) - state.reference[order];
      exp_series<T, orders>(x, load<T>(tile.rows[key][0]));
#pragma GCC unroll 3
      for (int order = 1; order <= orders; ++order) {
        store<T>(tile.rows[key][order], x[order]);
        sum[order] += x[order];
      }
    }
#pragma GCC unroll 3
    for (int order = 1; order <= orders; ++order) state.total[order] += sum[order];
  }
}

// sums [width][orders + 1][lanes] = factor * sums + weights [key][orders + 1][lanes] * values [key][orders + 1][width].
// The keys are summed by themselves first: rounding errors grow with the length of a sum.
template <typename T, int orders, int width>
inline void accumulate(const T (*weights)[orders + 1][kLanes<T>], int64_t keys, const T* values,
                       const Vector<T>* factor, T* sums) {
  Vector<T> sum[width][orders + 1] = {};
  for (int64_t key = 0; key < keys; ++key) {
    Vector<T> p[orders + 1];
#pragma GCC unroll 3
    for (int order = 0; order <= orders; ++order) p[order] = load<T>(weights[key][order]);
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) {
      T v[orders + 1];
#pragma GCC unroll 3
      for (int order = 0; order <= orders; ++order) v[order] = values[order * width + i];
      add_product<orders>(sum[i], p, v);
    }
    values += (orders + 1) * width;
  }
#pragma GCC unroll 8
  for (int i = 0; i < width; ++i) {
    Vector<T> before[orders + 1];
#pragma GCC unroll 3
    for (int order = 0; order <= orders; ++order) before[order] = load<T>(sums + order * kLanes<T>);
    add_product<orders>(sum[i], before, factor);
#pragma GCC unroll 3
    for (int order = 0; order <= orders; ++order) store<T>(sums + order * kLanes<T>, sum[i][order]);
    sums += (orders + 1) * kLanes<T>;
  }
}

// The same for all components: `values` [component block][token][orders + 1][component in the block], of which the
// tokens from `first` on count, `sums` [component][orders + 1][lanes].
template <typename T, int orders>
inline void accumulate_rows(const T (*weights)[orders + 1][kLanes<T>], int64_t keys, const T* values, int64_t tokens,
                            int64_t first, int64_t padded_dim, const Vector<T>* factor, T* sums) {
  for (int64_t i = 0; i < padded_dim; i += kValueBlock) {
    T* block_sums = sums + i * (orders + 1) * kLanes<T>;
    const T* block = values + i * tokens * (orders + 1);
    if (padded_dim - i >= kValueBlock) {
      accumulate<T, orders, kValueBlock>(weights, keys, block + first * (orders + 1) * kValueBlock, factor, block_sums);
    } else {
      accumulate<T, orders, kValueRemainder>(weights, keys, block + first * (orders + 1) * kValueRemainder, factor,
                                             block_sums);
    }
  }
}

// Component i of the tokens first <= j < first + count, lane j of the vector number i * step of `sums`. Components are
// neighbours in memory.
template <typename T>
void write_lanes(const AttentionWindow& window, const AttentionStrides& strides, int64_t first, int64_t count,
                 int64_t head_dim, const T* sums, int64_t step, T* to) {
  T* rows[kLanes<T>];
  for (int64_t lane = 0; lane < count; ++lane) rows[lane] = to + token_offset(window, strides, first + lane);
  for_each_width<T>(head_dim, [&](int64_t i, auto width) {
    Vector<T> lanes[kLanes<T>] = {};
#pragma GCC unroll 16
    for (int j = 0; j < width(); ++j) lanes[j] = load<T>(sums + (i + j) * step * kLanes<T>);
    if constexpr (width() > 1) transpose<T>(lanes);
    for (int64_t lane = 0; lane < count; ++lane) {
      if constexpr (width() == 1) {
        rows[lane][i] = lanes[0][lane];
      } else {
        std::memcpy(rows[lane] + i, &lanes[lane], width() * sizeof(T));
      }
    }
  });
}

// y = sums / total, as derivatives, to the tokens first <= i < first + count of the output.
template <typename T, int orders>
void write_rows(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, int64_t first, int64_t count,
                const SoftmaxState<orders, Vector<T>>& state, T* sums) {
  const AttentionStrides strides = output_strides(problem);
  const Vector<T> inverse = T(1) / state.total[0];
  for (int64_t i = 0; i < problem.head_dim; ++i) {
    T* row = sums + i * (orders + 1) * kLanes<T>;
    Vector<T> y[orders + 1];
    for (int order = 0; order <= orders; ++order) y[order] = load<T>(row + order * kLanes<T>);
    divide_series<orders>(y, state.total, inverse);
    if constexpr (orders >= 2) y[2] = y[2] + y[2];
    for (int order = 0; order <= orders; ++order) store<T>(row + order * kLanes<T>, y[order]);
  }
  for (int order = 0; order <= orders; ++order)
    write_lanes(window, strides, first, count, problem.head_dim, sums + order * kLanes<T>, orders + 1,
                problem.output + order * strides.order);
}

// One vector of queries against all keys of its window.
template <typename T, int orders>
void attend(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, const AttentionMemory<T>& memory,
            int64_t query, int64_t queries) {
  const int64_t tokens = window.tokens();
  ScoreTile<T, orders> tile;
  SoftmaxState<orders, Vector<T>> state = {};
  state.reference[0] = broadcast<T>(kLowest<T>);
  pack_queries<T, orders>(problem, window, query, queries, memory.queries);
  for (int64_t i = 0; i < memory.padded_dim * (orders + 1); ++i) store<T>(memory.sums + i * kLanes<T>, Vector<T>{});
  for (int64_t key = 0; key < tokens; key += kTile) {
    const int64_t keys = tokens - key < kTile ? tokens - key : kTile;
    for (int64_t block = 0; block < keys; block += kKeyBlock)
      score_block<T, orders>(memory.queries, memory.keys + (key + block) * problem.head_dim * (orders + 1),
                             problem.head_dim, tile.rows + block);
    if (problem.bias) add_bias(problem, window, query, queries, key, keys, tile);
    Vector<T> factor[orders + 1];
    online_softmax_step(tile, keys, state, factor);
    accumulate_rows<T, orders>(tile.rows, keys, memory.values, tokens, key, memory.padded_dim, factor, memory.sums);
  }
  write_rows(problem, window, query, queries, state, memory.sums);
}

template <typename T, int orders>
void attend_units(const WindowAttentionTaylor<T>& problem, int64_t begin, int64_t end, char* bytes) {
  Arena arena(bytes);
  const AttentionMemory<T> memory(problem, arena);
  const int64_t per_window = units_per_window(problem);
  int64_t ready = -1;  // the window whose keys and values are packed
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit / per_window, first = unit % per_window * kQueriesPerUnit;
    const AttentionWindow window = window_at(problem, index);
    const int64_t tokens = window.tokens();
    const int64_t last = first + kQueriesPerUnit < tokens ? first + kQueriesPerUnit : tokens;
    if (first >= last) continue;
    if (index != ready) {
      pack_keys<T, orders>(problem, window, memory.keys);
      pack_values<T, orders>(problem, window, memory.padded_dim, memory.values);
      ready = index;
    }
    for (int64_t query = first; query < last; query += kLanes<T>)
      attend<T, orders>(problem, window, memory, query, last - query < kLanes<T> ? last - query : kLanes<T>);
  }
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void window_attention_taylor(const WindowAttentionTaylor<T>& problem, int64_t begin, int64_t end, char* bytes) {
  with_orders(problem.orders, [&](auto orders) { attend_units<T, orders()>(problem, begin, end, bytes); });
}
template void window_attention_taylor(const WindowAttentionTaylor<float>&, int64_t, int64_t, char*);
template void window_attention_taylor(const WindowAttentionTaylor<double>&, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
