// The forward pass of windowed attention for one instruction set.
//
// A group of queries meets the keys in tiles, strip by strip. Scores lie [key][query], the lanes of a vector are
// queries: a row's maximum and sum are vectors, and nothing is summed across lanes. Sums of weighted values have
// components as lanes, as the values lie in memory, or, where a head is too narrow for that, queries again.
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

// Queries whose scores are in the first cache from the product that makes them to the one that takes them.
constexpr int kStripVectors = 2;
template <typename T>
constexpr int64_t kStrip = kStripVectors * kLanes<T>;  // at most kMostStrip

// Scores [key][kStrip queries] of a tile, in so many vectors, to weights, [key][kStrip] or [pair of keys][kStrip];
// `factor` is what sums over earlier tiles are to be multiplied with.
template <typename T, typename Operand, int vectors>
void online_softmax_step(T* scores, int64_t keys, T* maximum, T* total, T* factor) {
  constexpr int kParts = 4 / vectors;  // of the keys, whose maxima and sums do not wait for each other
  Vector<T> before[vectors], most[vectors], sum[vectors] = {}, largest[kParts][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    before[v] = load<T>(maximum + v * kLanes<T>);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) largest[part][v] = before[v];
  }
  const auto compare = [&](int64_t key, int part) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      largest[part][v] = maximum_of<T>(load<T>(scores + key * kStrip<T> + v * kLanes<T>), largest[part][v]);
  };
  int64_t key = 0;
  for (; key + kParts <= keys; key += kParts)
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) compare(key + part, part);
  for (; key < keys; ++key) compare(key, 0);
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    most[v] = largest[0][v];
#pragma GCC unroll 4
    for (int part = 1; part < kParts; ++part) most[v] = maximum_of<T>(most[v], largest[part][v]);
  }
  const auto weigh = [&](int64_t i, int v) {
    const Vector<T> weight = weight_of(load<T>(scores + i * kStrip<T> + v * kLanes<T>) - most[v]);
    sum[v] += weight;
    return weight;
  };
  if constexpr (is_pair<Operand>) {
    auto* const pairs = reinterpret_cast<Pair*>(scores);
    for (key = 0; key < keys; key += 2)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vector<T> first = weigh(key, v), second = key + 1 < keys ? weigh(key + 1, v) : Vector<T>{};
        store<Pair>(pairs + key / 2 * kStrip<T> + v * kLanes<T>, round_and_interleave(first, second));
      }
  } else {
    for (key = 0; key < keys; ++key)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store<T>(scores + key * kStrip<T> + v * kLanes<T>, weigh(key, v));
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = v * kLanes<T>;
    const Vector<T> decay = weight_of(before[v] - most[v]);
    store<T>(maximum + at, most[v]);
    store<T>(factor + at, decay);
    store<T>(total + at, decay * load<T>(total + at) + sum[v]);
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
    write_row(sums, size, problem.output.type, problem.output.at(token.index, head * size));
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
    prefetch_share<1>(problem.output, window.queries, part, parts);
  }

  template <int write, typename Byte>
  [[gnu::always_inline]] void prefetch_share(const TokenMap<Byte>& map, const TokenList& tokens, int64_t part,
                                             int64_t parts) const {
    const int64_t all = parts * problem.heads, begin = tokens.count * (head * parts + part) / all,
                  end = tokens.count * (head * parts + part + 1) / all;
    prefetch<write>(map, tokens, begin, end, 0, problem.heads * problem.head_dim);
  }
};

// Rows of one head in a thread's memory as operands of products: numbers, or pairs of them, [token][operand], and
// values likewise, or as [pair of tokens][component].
template <typename Operand>
struct HeadRows {
  Operand *queries, *columns, *keys, *values;  // columns: queries of a group, [operand][query]

  template <typename T>
  explicit HeadRows(const ForwardMemory<T>& memory)
      : queries(reinterpret_cast<Operand*>(memory.queries)),
        columns(reinterpret_cast<Operand*>(memory.columns)),
        keys(reinterpret_cast<Operand*>(memory.keys)),
        values(reinterpret_cast<Operand*>(memory.values)) {}
};

// A strip of a group's queries, from `query` on, against a tile of keys: scores, weights, and their sums of values.
template <typename Operand, typename T>
void attend_strip(const WindowAttention<T>& problem, int64_t head, bool components, int64_t query, int64_t count,
                  int64_t key, int64_t keys, const T* base, const ForwardMemory<T>& memory) {
  const int64_t size = problem.head_dim, depth = operand_count<Operand>(size), padded_dim = memory.padded_dim;
  const HeadRows<Operand> rows(memory);
  T *const scores = memory.scores, *const factor = memory.factor + query, *const maximum = memory.maximum + query;
  T *const sums = memory.sums + query * padded_dim, *const column_sums = memory.column_sums + query;
  multiply<T, Operand>({rows.keys + key * depth, depth, 1, rows.columns + query, kGroup, base ? base + query : nullptr,
                        kGroup, scores, kStrip<T>, is_pair<Operand> ? head_factor(problem, head) : T(1)},
                       keys, count, depth);
  if (count > kLanes<T>) {
    online_softmax_step<T, Operand, kStripVectors>(scores, keys, maximum, memory.total + query, factor);
  } else {
    online_softmax_step<T, Operand, 1>(scores, keys, maximum, memory.total + query, factor);
  }
  const auto* const weights = reinterpret_cast<const Operand*>(scores);
  const Operand* values = rows.values + operand_count<Operand>(key) * size;
  keys = operand_count<Operand>(keys);
  if (components) {
    if (key > 0) scale_rows(factor, count, size, padded_dim, sums);
    multiply<T, Operand>({weights, 1, kStrip<T>, values, size, key > 0 ? sums : nullptr, padded_dim, sums, padded_dim},
                         count, size, keys);
  } else {
    if (key > 0) scale_columns(factor, count, size, column_sums);
    multiply<T, Operand>(
        {values, 1, size, weights, kStrip<T>, key > 0 ? column_sums : nullptr, kGroup, column_sums, kGroup}, size,
        count, keys);
  }
}

// A group of queries against all keys of its window.
template <typename Operand, typename T>
void attend_group(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head, int64_t first,
                  int64_t count, const NextWindow<T>& next, const ForwardMemory<T>& memory) {
  const int64_t size = problem.head_dim, depth = operand_count<Operand>(size);
  const bool components = lanes_are_components<T>(window_tokens(problem), size);
  const HeadRows<Operand> rows(memory);
  transpose_to_columns(rows.queries + first * depth, count, depth, head_factor(problem, head), rows.columns);
  prepare_group(problem, window, first, count, memory);
  fill(memory.maximum, kGroup, kLowest<T>);
  fill(memory.total, kGroup, T(0));
  for (int64_t key = 0; key < window.keys.count; key += kKeyTile) {
    const int64_t keys = window.keys.count - key < kKeyTile ? window.keys.count - key : kKeyTile;
    const T* base = score_base(problem, window, head, first, count, key, keys, memory);
    for (int64_t query = 0; query < count; query += kStrip<T>) {
      const int64_t part = count - query < kStrip<T> ? count - query : kStrip<T>;
      if (first + key == 0) next.prefetch_part(query / kStrip<T>, (count + kStrip<T> - 1) / kStrip<T>);
      attend_strip<Operand>(problem, head, components, query, part, key, keys, base, memory);
    }
  }
  if (!components) transpose_to_rows(memory.column_sums, count, size, memory.padded_dim, memory.sums);
  write_group(problem, window, head, first, count, memory);
}

// Queries, keys and values of one head, as operands.
template <typename T>
void pack_operands(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head,
                   const ForwardMemory<T>& memory, T) {
  pack_qkv(problem, window, head, memory.queries, memory.keys, memory.values);
  if (problem.attn_scale)
    mean_regions(window, window.keys, memory.values, problem.head_dim, memory.padded_dim, T(1), memory.means);
}

inline void pack_operands(const WindowAttention<float>& problem, const TokenWindow& window, int64_t head,
                          const ForwardMemory<float>& memory, Pair) {
  const int64_t size = problem.head_dim, part = problem.heads * size;
  const HeadRows<Pair> rows(memory);
  pack_rows(problem.q, window.queries, size, head, problem.pad_token, rows.queries);
  pack_rows(problem.k, window.keys, size, head, problem.pad_token + part, rows.keys);
  pack_row_pairs(problem.v, window.keys, size, head, problem.pad_token + 2 * part,
                 reinterpret_cast<BFloat16*>(memory.sums), rows.values);
}

// Whether operands are pairs: not with AttnScale, which wants means of values.
template <typename T>
bool takes_pairs(const WindowAttention<T>& problem) {
  const auto fits = [](const TokenMap<const char>& map) { return map.type == ScalarType::bfloat16; };
  return kHasPairs && fits(problem.q) && fits(problem.k) && fits(problem.v) && !problem.attn_scale;
}

template <typename Operand, typename T>
void attend(const WindowAttention<T>& problem, int64_t begin, int64_t end, char* bytes) {
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
      pack_operands(problem, window, head, memory, Operand());
    }
    const int64_t following = task / problem.heads + 1;
    const NextWindow<T> next = {problem, windows.next(task / problem.heads, following < count ? following : count - 1),
                                head};
    const int64_t last = first + kUnit < window.queries.count ? first + kUnit : window.queries.count;
    for (int64_t query = first; query < last; query += kGroup)
      attend_group<Operand>(problem, window, head, query, last - query < kGroup ? last - query : kGroup, next, memory);
  }
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void group_queries(const T* matrix, int64_t queries, int64_t keys, T* groups) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t query = 0; query < group_count(queries) * kGroup; query += lanes)
    for (int64_t key = 0; key < keys; key += lanes) {
      const T* from = matrix + query * keys + key;
      T* to = groups + (query / kGroup * keys + key) * kGroup + query % kGroup;
      if (query + lanes <= queries && key + lanes <= keys) {
        transpose_block(from, keys, to, kGroup);
      } else {
        for (int64_t i = 0; i < lanes && key + i < keys; ++i)
          for (int64_t j = 0; j < lanes; ++j) to[i * kGroup + j] = query + j < queries ? from[j * keys + i] : T(0);
      }
    }
}

template <typename T>
void ungroup_queries(const T* groups, int64_t queries, int64_t keys, T* matrix) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t query = 0; query < queries; query += lanes)
    for (int64_t key = 0; key < keys; key += lanes) {
      const T* from = groups + (query / kGroup * keys + key) * kGroup + query % kGroup;
      T* to = matrix + query * keys + key;
      if (query + lanes <= queries && key + lanes <= keys) {
        transpose_block(from, kGroup, to, keys);
      } else {
        for (int64_t i = 0; i < lanes && query + i < queries; ++i)
          for (int64_t j = 0; j < lanes && key + j < keys; ++j) to[i * keys + j] = from[j * kGroup + i];
      }
    }
}

template <typename T>
void window_attention(const WindowAttention<T>& problem, int64_t begin, int64_t end, char* memory) {
  if constexpr (kHasPairs && sizeof(T) == sizeof(float))
    if (takes_pairs(problem)) return attend<Pair>(problem, begin, end, memory);
  attend<T>(problem, begin, end, memory);
}

template void group_queries(const float*, int64_t, int64_t, float*);
template void group_queries(const double*, int64_t, int64_t, double*);
template void ungroup_queries(const float*, int64_t, int64_t, float*);
template void ungroup_queries(const double*, int64_t, int64_t, double*);
template void window_attention(const WindowAttention<float>&, int64_t, int64_t, char*);
template void window_attention(const WindowAttention<double>&, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
