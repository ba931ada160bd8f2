// Softmax attention inside windows, forward and backward, on the CPU: what the kernels compute, which tokens a window
// has in every layout, and the memory that a thread needs. No torch header.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/for_each_isa.h"
#include "scalar_type.h"
#include "window_geometry.h"

namespace asvit_fast {

constexpr int kAxes = 3;  // depth, rows and columns; a map of rows and columns has a depth of 1

// A map [batch, *axes, heads, head_dim] of numbers of `type`, the last two dimensions contiguous, tokens `distance`
// numbers apart. Byte: char or const char.
template <typename Byte>
struct TokenMap {
  Byte* data;
  int64_t distance;
  ScalarType type;

  Byte* at(int64_t token, int64_t channel) const { return data + (token * distance + channel) * element_bytes(type); }
};

template <typename T>
struct WindowAttention {
  TokenMap<const char> q, k, v;
  const T* pad_token;   // [3, heads, head_dim], a token of padding; read where padding is attended only
  const T* bias;        // [heads, groups of queries, keys, kGroup], or null
  const T* attn_scale;  // [heads] or null
  const T* head_scale;  // [heads] or null: further factors of the scores
  TokenMap<char> output;
  T* statistics;  // [2, batch, *axes, heads]: a query's largest score, 1 / sum of its weights
  WindowAxis axes[kAxes];
  WindowLayout layout;
  int64_t batch, heads, head_dim;
  T scale;  // of the scores
};

// Gradients of parameters are the sums over pieces, into which the windows of each head are cut whatever the number of
// threads: sums in a fixed order. Zeros at first; null where not needed.
template <typename T>
struct WindowAttentionBackward {
  WindowAttention<T> forward;
  TokenMap<const char> gradient;          // of the output
  TokenMap<char> grad_q, grad_k, grad_v;  // written whole; where keys have a margin, the latter two are null, and
  T *window_grad_k, *window_grad_v;  // [windows, keys of a window, heads, head_dim], zeros at first; null otherwise
  T* grad_bias;                      // [pieces, *as bias]
  T* grad_pad_token;                 // [pieces, 3, heads, head_dim]
  T* grad_attn_scale;                // [pieces, heads], as the next
  T* grad_head_scale;
  int64_t pieces;
};

// The units begin <= i < end of window_count() * heads * query_units(), with the memory of a ForwardMemory; the tasks
// begin <= i < end of pieces * heads, with the memory of a BackwardMemory. Memory is aligned to 64 bytes and no other
// thread's.
//
// group_queries: a matrix [queries, keys] as [groups of queries, keys, kGroup], with zeros for missing queries;
// ungroup_queries: the inverse.
ASVIT_FAST_FOR_EACH_ISA(window_attention, const WindowAttention<T>& problem, int64_t begin, int64_t end, char* memory)
ASVIT_FAST_FOR_EACH_ISA(window_attention_backward, const WindowAttentionBackward<T>& problem, int64_t begin,
                        int64_t end, char* memory)

ASVIT_FAST_FOR_EACH_ISA(group_queries, const T* matrix, int64_t queries, int64_t keys, T* groups)
ASVIT_FAST_FOR_EACH_ISA(ungroup_queries, const T* groups, int64_t queries, int64_t keys, T* matrix)

namespace {  // one copy per including file, as in window_attention_taylor.h

constexpr int64_t kMaximumLanes = 16;
constexpr int64_t kMostStrip = 2 * kMaximumLanes;  // queries whose scores are in memory at a time
constexpr int64_t kGroup = 64;                     // queries that go through the keys together
constexpr int64_t kKeyTile = 64;                   // keys whose scores are in memory at a time
constexpr int64_t kUnit = 2 * kGroup;              // queries of one window that work is handed out in
constexpr int64_t kRegions = 8;                    // parts of a window that a shift along all axes brings together
constexpr double kRegionScore = -100.0;            // added to that of a query and a key in different regions

inline int64_t padded_to_vector(int64_t count) { return (count + kMaximumLanes - 1) / kMaximumLanes * kMaximumLanes; }

inline int64_t group_count(int64_t queries) { return (queries + kGroup - 1) / kGroup; }

// ----------------------------------------------------------------------------------------------------------- windows

inline int64_t window_count(const WindowAxis (&axes)[kAxes], WindowLayout layout) {
  int64_t count = 1;
  for (const WindowAxis& axis : axes) count *= axis_windows(axis, layout);
  return count;
}

template <typename T>
inline int64_t window_count(const WindowAttention<T>& problem) {
  return problem.batch * window_count(problem.axes, problem.layout);
}

template <typename T>
inline bool has_margin(const WindowAttention<T>& problem) {
  return problem.axes[0].margin + problem.axes[1].margin + problem.axes[2].margin > 0;
}

// Queries of a whole window.
template <typename T>
inline int64_t window_tokens(const WindowAttention<T>& problem) {
  return problem.axes[0].window * problem.axes[1].window * problem.axes[2].window;
}

// Keys of a whole window.
template <typename T>
inline int64_t window_keys(const WindowAttention<T>& problem) {
  int64_t count = 1;
  for (const WindowAxis& axis : problem.axes) count *= axis.window + 2 * axis.margin;
  return count;
}

template <typename T>
inline int64_t query_units(const WindowAttention<T>& problem) {
  return (window_tokens(problem) + kUnit - 1) / kUnit;
}

template <typename T>
inline int64_t map_tokens(const WindowAttention<T>& problem) {
  return problem.batch * problem.axes[0].size * problem.axes[1].size * problem.axes[2].size;
}

struct Token {
  int64_t index;   // on the map of all images; -1: padding
  int32_t place;   // in the whole window, as the bias counts
  int32_t region;  // 0 ... kRegions - 1

  bool is_padding() const { return index < 0; }
};

struct TokenList {
  const Token* data;
  int64_t count;

  const Token& operator[](int64_t i) const { return data[i]; }
};

// The tokens of one window of one image.
struct TokenWindow {
  int64_t index;
  TokenList queries, keys;
  bool complete;  // places are 0, 1, ...
  bool regions;   // there is more than one
};

// The tokens of a window of one image, whose first token has the index `image`. `places` there are along each axis.
inline TokenList list_tokens(int64_t image, const AxisWindow (&axes)[kAxes], const int64_t (&places)[kAxes],
                             Token* tokens) {
  Token* to = tokens;
  for (int64_t i = 0; i < axes[0].length; ++i) {
    const AxisToken slice = axes[0].token(i);
    for (int64_t j = 0; j < axes[1].length; ++j) {
      const AxisToken row = axes[1].token(j);
      const bool beyond = slice.position < 0 || row.position < 0;
      const int64_t start = image + (slice.position * axes[1].axis.size + row.position) * axes[2].axis.size;
      const auto place = static_cast<int32_t>((slice.offset * places[1] + row.offset) * places[2]);
      const int32_t region = 4 * slice.region + 2 * row.region;
      for (int64_t k = 0; k < axes[2].length; ++k) {
        const AxisToken column = axes[2].token(k);
        const bool padding = beyond || column.position < 0;
        *to++ = {padding ? -1 : start + column.position, place + column.offset, region + column.region};
      }
    }
  }
  return {tokens, to - tokens};
}

// `tokens` has room for window_tokens() + window_keys().
template <typename T>
inline TokenWindow window_at(const WindowAttention<T>& problem, int64_t index, Token* tokens) {
  const WindowAxis(&axes)[kAxes] = problem.axes;
  int64_t counts[kAxes], places[kAxes] = {axes[0].window, axes[1].window, axes[2].window};
  for (int axis = 0; axis < kAxes; ++axis) counts[axis] = axis_windows(axes[axis], problem.layout);
  const int64_t at[kAxes] = {index / counts[2] / counts[1] % counts[0], index / counts[2] % counts[1],
                             index % counts[2]};
  const auto window = [&](int axis) { return AxisWindow(axes[axis], problem.layout, at[axis]); };
  const int64_t image = index / counts[2] / counts[1] / counts[0] * axes[0].size * axes[1].size * axes[2].size;
  const TokenList queries = list_tokens(image, {window(0), window(1), window(2)}, places, tokens);
  TokenWindow found = {index, queries, queries, true, false};
  if (has_margin(problem)) {
    for (int axis = 0; axis < kAxes; ++axis) places[axis] += 2 * axes[axis].margin;
    const auto keys = [&](int axis) { return AxisWindow::keys(axes[axis], problem.layout, at[axis]); };
    found.keys = list_tokens(image, {keys(0), keys(1), keys(2)}, places, tokens + window_tokens(problem));
  }
  found.complete = queries.count == window_tokens(problem) && found.keys.count == window_keys(problem);
  for (int64_t i = 0; i < queries.count && !found.regions; ++i) found.regions = queries[i].region != queries[0].region;
  return found;
}

// ------------------------------------------------------------------------------------------------------------ memory

// `count` tokens of one head: [token][component], read in vectors and so with a vector's room at the end.
template <typename T>
inline T* take_rows(Arena& arena, int64_t count, int64_t padded_dim) {
  return arena.take<T>((count + kMaximumLanes) * padded_dim);
}

template <typename T>
inline Token* take_tokens(Arena& arena, const WindowAttention<T>& problem) {
  return arena.take<Token>(2 * (window_tokens(problem) + window_keys(problem)));
}

template <typename T>
struct ForwardMemory {
  Token* tokens;                // of two windows
  T *queries, *keys, *values;   // [token][component]
  T* columns;                   // queries of a group, [component][query]
  T* scores;                    // of a strip of queries and a tile, [key][query]
  T* base;                      // what is added to them, [key][query]
  T* region_scores;             // of a group, [region of a key][query]
  int64_t* bias_places;         // of a group, [query]
  T* sums;                      // [query][padded_dim]
  T* column_sums;               // [component][query]
  T *maximum, *total, *factor;  // [query]
  T* means;                     // of the values of a region, [region][padded_dim]
  int64_t padded_dim;

  ForwardMemory(const WindowAttention<T>& problem, Arena& arena) {
    const int64_t query_count = window_tokens(problem), key_count = window_keys(problem);
    padded_dim = padded_to_vector(problem.head_dim);
    tokens = take_tokens(arena, problem);
    queries = take_rows<T>(arena, query_count, padded_dim);
    keys = take_rows<T>(arena, key_count, padded_dim);
    values = take_rows<T>(arena, key_count, padded_dim);
    columns = arena.take<T>(padded_dim * kGroup);
    scores = arena.take<T>(kKeyTile * kMostStrip);
    base = arena.take<T>(kKeyTile * kGroup);
    region_scores = arena.take<T>(kRegions * kGroup);
    bias_places = arena.take<int64_t>(kGroup);
    sums = arena.take<T>(kGroup * padded_dim);
    column_sums = arena.take<T>(padded_dim * kGroup);
    maximum = arena.take<T>(kGroup);
    total = arena.take<T>(kGroup);
    factor = arena.take<T>(kGroup);
    means = arena.take<T>(2 * kRegions * padded_dim);
  }
};

template <typename T>
struct BackwardMemory {
  Token* tokens;                            // of two windows
  T *queries, *keys, *values, *gradients;   // [token][component]
  T *grad_keys, *grad_values;               // [key][padded_dim]
  T *query_columns, *gradient_columns;      // of a group, [component][query]
  T *query_vectors, *gradient_vectors;      // of a group, several narrow rows in a vector
  T *weights, *scores;                      // of a group and a tile, [key][query]; scores: the gradients of
  T* base;                                  // [key][query]
  T* region_scores;                         // [region of a key][query]
  int64_t* bias_places;                     // [query]
  T* grad_queries;                          // [query][padded_dim]
  T* column_sums;                           // [component][query]
  T *maximum, *inverse, *delta, *products;  // [query]
  T* means;                                 // [region][padded_dim]
  int64_t padded_dim;

  BackwardMemory(const WindowAttention<T>& problem, Arena& arena) {
    const int64_t query_count = window_tokens(problem), key_count = window_keys(problem);
    padded_dim = padded_to_vector(problem.head_dim);
    tokens = take_tokens(arena, problem);
    queries = take_rows<T>(arena, query_count, padded_dim);
    keys = take_rows<T>(arena, key_count, padded_dim);
    values = take_rows<T>(arena, key_count, padded_dim);
    gradients = take_rows<T>(arena, query_count, padded_dim);
    grad_keys = take_rows<T>(arena, key_count, padded_dim);
    grad_values = take_rows<T>(arena, key_count, padded_dim);
    query_columns = arena.take<T>(padded_dim * kGroup);
    gradient_columns = arena.take<T>(padded_dim * kGroup);
    query_vectors = arena.take<T>(padded_dim * kGroup);
    gradient_vectors = arena.take<T>(padded_dim * kGroup);
    weights = arena.take<T>(kKeyTile * kGroup);
    scores = arena.take<T>(kKeyTile * kGroup);
    base = arena.take<T>(kKeyTile * kGroup);
    region_scores = arena.take<T>(kRegions * kGroup);
    bias_places = arena.take<int64_t>(kGroup);
    grad_queries = arena.take<T>(kGroup * padded_dim);
    column_sums = arena.take<T>(padded_dim * kGroup);
    maximum = arena.take<T>(kGroup);
    inverse = arena.take<T>(kGroup);
    delta = arena.take<T>(kGroup);
    products = arena.take<T>(kGroup);
    means = arena.take<T>(2 * kRegions * padded_dim);
  }
};

}  // namespace
}  // namespace asvit_fast
