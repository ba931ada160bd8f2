// The forward pass of windowed attention for one instruction set.
//
// A group of queries meets the keys in tiles. Scores lie [key][query], the lanes of a vector are queries: a row's
// maximum and sum are vectors, and nothing is summed across lanes. Sums of weighted values have components as lanes, as
// the values lie in memory, or, where a head is too narrow for that, queries again.
#pragma once

#include "cpu/small_matmul.h"
#include "cpu/weight_of.h"
#include "cpu/window_rows.h"

namespace asvit_fast {
namespace {

template <typename T>
inline Vector<T> maximum_of(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// One head's bias, [groups of queries][keys][kGroup].
template <typename T>
inline const T* head_bias(const WindowAttention<T>& problem, int64_t head) {
  return problem.bias + head * group_count(window_tokens(problem)) * window_keys(problem) * kGroup;
}

// What the terms added to the scores of `count` queries are found by: in windows of several regions, to [region of a
// key][kGroup queries], what sets them apart; in parts of windows, places of queries in their head's bias.
template <typename T, typename Memory>
void prepare_group(const WindowAttention<T>& problem, const TokenWindow& window, int64_t first, int64_t count,
                   const Memory& memory) {
  const Token* queries = window.queries.data + first;
  if (window.regions)
    for (int32_t region = 0; region < kRegions; ++region)
      for (int64_t i = 0; i < count; ++i)
        memory.region_scores[region * kGroup + i] = queries[i].region == region ? T(0) : T(kRegionScore);
  if (!window.complete) {
    const int64_t group_size = window_keys(problem) * kGroup;
    for (int64_t i = 0; i < count; ++i)
      memory.bias_places[i] = queries[i].place / kGroup * group_size + queries[i].place % kGroup;
  }
}

// The terms added to the scores of a group of queries from `first` on and the keys from `key` on, [key][kGroup
// queries], or null: the bias, and what sets regions apart. Collected in memory where they do not lie ready.
template <typename T, typename Memory>
const T* score_base(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head, int64_t first,
                    int64_t count, int64_t key, int64_t keys, const Memory& memory) {
  if (!problem.bias && !window.regions) return nullptr;
  const T* bias = problem.bias ? head_bias(problem, head) : nullptr;
  const int64_t group = first / kGroup * window_keys(problem) * kGroup;
  if (window.complete && !window.regions) return bias + group + key * kGroup;
  for (int64_t i = 0; i < keys; ++i) {
    const Token& token = window.keys[key + i];
    T* to = memory.base + i * kGroup;
    if (window.complete) {
      const T *apart = memory.region_scores + token.region * kGroup, *from = bias + group + (key + i) * kGroup;
      for (int64_t j = 0; j < count; j += kLanes<T>)
        store<T>(to + j, bias ? load<T>(from + j) + load<T>(apart + j) : load<T>(apart + j));
    } else {  // a part of a window, and so of one region
      const T* from = bias + token.place * kGroup;
      for (int64_t j = 0; j < count; ++j) to[j] = from[memory.bias_places[j]];
    }
  }
  return memory.base;
}

// Scores [key][query] of a group and a tile.
template <typename T>
void score_tile(const T* keys, const T* columns, int64_t head_dim, int64_t count, int64_t key_count, const T* base,
                T* scores) {
  multiply<T>({keys, head_dim, 1, columns, kGroup, base, kGroup, scores, kGroup}, key_count, count, head_dim);
}

// Scores of a tile to weights; `factor` is what sums over earlier tiles are to be multiplied with.
template <typename T>
void online_softmax_step(T* scores, int64_t count, int64_t keys, T* maximum, T* total, T* factor) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vector<T> before = load<T>(maximum + i);
    Vector<T> largest[4] = {before, before, before, before};  // independent of each other
    int64_t key = 0;
    for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) largest[j] = maximum_of<T>(load<T>(scores + (key + j) * kGroup + i), largest[j]);
    for (; key < keys; ++key) largest[0] = maximum_of<T>(load<T>(scores + key * kGroup + i), largest[0]);
    const Vector<T> most = maximum_of<T>(maximum_of<T>(largest[0], largest[1]), maximum_of<T>(largest[2], largest[3]));
    Vector<T> sum = {};
    for (key = 0; key < keys; ++key) {
      const Vector<T> weight = weight_of(load<T>(scores + key * kGroup + i) - most);
      store<T>(scores + key * kGroup + i, weight);
      sum += weight;
    }
    const Vector<T> decay = weight_of(before - most);
    store<T>(maximum + i, most);
    store<T>(factor + i, decay);
    store<T>(total + i, decay * load<T>(total + i) + sum);
  }
}

// The factor of one head's scores.
template <typename T>
inline T head_factor(const WindowAttention<T>& problem, int64_t head) {
  return problem.head_scale ? problem.scale * problem.head_scale[head] : problem.scale;
}

// Whether components are the lanes of sums over keys: fewer lanes are empty then, or hardly more (and no result has to
// be transposed).
template <typename T>
inline bool lanes_are_components(int64_t tokens, int64_t head_dim) {
  const auto padded = [](int64_t size) { return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>; };
  return 8 * tokens * padded(head_dim) <= 9 * padded(tokens) * head_dim;
}

template <typename T>
inline void fill(T* to, int64_t size, T value) {
  for (int64_t i = 0; i < size; i += kLanes<T>) store<T>(to + i, broadcast<T>(value));
}

// to [row][padded_dim] *= factor [row]
template <typename T>
void scale_rows(const T* factor, int64_t rows, int64_t size, int64_t padded_dim, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < size; j += kLanes<T>) {
      T* at = to + i * padded_dim + j;
      store<T>(at, factor[i] * load<T>(at));
    }
}

// to [component][kGroup queries] *= factor [query]
template <typename T>
void scale_columns(const T* factor, int64_t count, int64_t size, T* to) {
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      T* at = to + i * kGroup + j;
      store<T>(at, load<T>(factor + j) * load<T>(at));
    }
}

// to [region][padded_dim] = factor * sum of the rows [token][size] of each region / its number of keys. Compensated
// sums (Kahan): where most tokens are padding, they grow by one and the same number.
template <typename T>
void mean_regions(const TokenWindow& window, const TokenList& tokens, const T* rows, int64_t size, int64_t padded_dim,
                  T factor, T* to) {
  int64_t counts[kRegions] = {};
  T* const lost = to + kRegions * padded_dim;  // by rounding, as `to`
  fill(to, 2 * kRegions * padded_dim, T(0));
  for (int64_t i = 0; i < window.keys.count; ++i) ++counts[window.keys[i].region];
  for (int64_t i = 0; i < tokens.count; ++i) {
    const int64_t region = tokens[i].region * padded_dim;
    for (int64_t j = 0; j < size; j += kLanes<T>) {
      const Vector<T> before = load<T>(to + region + j),
                      row = load<T>(rows + i * size + j) - load<T>(lost + region + j);
      const Vector<T> after = before + row;
      store<T>(lost + region + j, (after - before) - row);
      store<T>(to + region + j, after);
    }
  }
  for (int64_t region = 0; region < kRegions; ++region) {
    const T share = factor / T(counts[region] > 0 ? counts[region] : 1);
    scale_rows(&share, 1, size, padded_dim, to + region * padded_dim);
  }
}

// The output of a group of queries from its sums, and what the backward pass needs.
template <typename T>
void write_group(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head, int64_t first,
                 int64_t count, const ForwardMemory<T>& memory) {
  const int64_t size = problem.head_dim, statistics = map_tokens(problem) * problem.heads;
  const T attn_scale = problem.attn_scale ? problem.attn_scale[head] : T(0);
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(memory.factor + i, T(1) / load<T>(memory.total + i));
  for (int64_t i = 0; i < count; ++i) {
    const Token& token = window.queries[first + i];
    if (token.is_padding()) continue;
    const int64_t row = token.index * problem.heads + head;
    problem.statistics[row] = memory.maximum[i];
    problem.statistics[statistics + row] = memory.factor[i];
    T* sums = memory.sums + i * memory.padded_dim;
    const T factor = (T(1) + attn_scale) * memory.factor[i];
    for (int64_t j = 0; j < size; j += kLanes<T>) {
      Vector<T> y = factor * load<T>(sums + j);
      if (problem.attn_scale) y -= attn_scale * load<T>(memory.means + token.region * memory.padded_dim + j);
      store<T>(sums + j, y);
    }
    copy_row(sums, size, problem.output + row * size);
  }
}

// The next window: its operands are prefetched during the computation, another part of them with every head.
template <typename T>
struct NextWindow {
  const WindowAttention<T>& problem;
  const TokenWindow& window;
  int64_t head;

  [[gnu::always_inline]] void prefetch_part(int64_t part, int64_t parts) const {
    prefetch_share<0>(problem.q, window.queries, part, parts);
    prefetch_share<0>(problem.k, window.keys, part, parts);
    prefetch_share<0>(problem.v, window.keys, part, parts);
    prefetch_share<1>(TokenMap<T>{problem.output, problem.heads * problem.head_dim}, window.queries, part, parts);
  }

  template <int write, typename U>
  [[gnu::always_inline]] void prefetch_share(const TokenMap<U>& map, const TokenList& tokens, int64_t part,
                                             int64_t parts) const {
    const int64_t all = parts * problem.heads, begin = tokens.count * (head * parts + part) / all,
                  end = tokens.count * (head * parts + part + 1) / all;
    prefetch<write>(map, tokens, begin, end, 0, problem.heads * problem.head_dim);
  }
};

// A group of queries against all keys of its window.
template <typename T>
void attend_group(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head, int64_t first,
                  int64_t count, const NextWindow<T>& next, const ForwardMemory<T>& memory) {
  const int64_t size = problem.head_dim, padded_dim = memory.padded_dim;
  const bool components = lanes_are_components<T>(window_tokens(problem), size);
  transpose_to_columns(memory.queries + first * size, count, size, head_factor(problem, head), memory.columns);
  prepare_group(problem, window, first, count, memory);
  fill(memory.maximum, kGroup, kLowest<T>);
  fill(memory.total, kGroup, T(0));
  if (first == 0) next.prefetch_part(0, 3);
  for (int64_t key = 0; key < window.keys.count; key += kKeyTile) {
    const int64_t keys = window.keys.count - key < kKeyTile ? window.keys.count - key : kKeyTile;
    const T* base = score_base(problem, window, head, first, count, key, keys, memory);
    score_tile(memory.keys + key * size, memory.columns, size, count, keys, base, memory.scores);
    if (first + key == 0) next.prefetch_part(1, 3);
    online_softmax_step(memory.scores, count, keys, memory.maximum, memory.total, memory.factor);
    if (first + key == 0) next.prefetch_part(2, 3);
    const T* values = memory.values + key * size;
    if (components) {
      if (key > 0) scale_rows(memory.factor, count, size, padded_dim, memory.sums);
      multiply<T>({memory.scores, 1, kGroup, values, size, key > 0 ? memory.sums : nullptr, padded_dim, memory.sums,
                   padded_dim},
                  count, size, keys);
    } else {
      if (key > 0) scale_columns(memory.factor, count, size, memory.column_sums);
      multiply<T>({values, 1, size, memory.scores, kGroup, key > 0 ? memory.column_sums : nullptr, kGroup,
                   memory.column_sums, kGroup},
                  size, count, keys);
    }
  }
  if (!components) transpose_to_rows(memory.column_sums, count, size, padded_dim, memory.sums);
  write_group(problem, window, head, first, count, memory);
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void window_attention(const WindowAttention<T>& problem, int64_t begin, int64_t end, char* bytes) {
  Arena arena(bytes);
  const ForwardMemory<T> memory(problem, arena);
  const int64_t units = query_units(problem), count = window_count(problem);
  Windows<T> windows(problem, memory.tokens);
  int64_t ready = -1;  // whose operands are packed
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % units * kUnit, task = index / units, head = task % problem.heads;
    const TokenWindow& window = windows.at(task / problem.heads);
    if (first >= window.queries.count) continue;
    if (task != ready) {
      ready = task;
      pack_qkv(problem, window, head, memory.queries, memory.keys, memory.values);
      if (problem.attn_scale)
        mean_regions(window, window.keys, memory.values, problem.head_dim, memory.padded_dim, T(1), memory.means);
    }
    const int64_t following = task / problem.heads + 1;
    const NextWindow<T> next = {problem, windows.next(task / problem.heads, following < count ? following : count - 1),
                                head};
    const int64_t last = first + kUnit < window.queries.count ? first + kUnit : window.queries.count;
    for (int64_t query = first; query < last; query += kGroup)
      attend_group(problem, window, head, query, last - query < kGroup ? last - query : kGroup, next, memory);
  }
}

template void window_attention(const WindowAttention<float>&, int64_t, int64_t, char*);
template void window_attention(const WindowAttention<double>&, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
