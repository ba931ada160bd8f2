// Softmax attention inside windows, forward and backward, on the CPU: what the kernels compute, which tokens a window
// has in every layout, and the memory that a thread needs. No torch header.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/for_each_isa.h"
#include "window_geometry.h"

namespace asvit_fast {

// The fused projection [batch, height, width, 3, heads, head_dim], the last three dimensions contiguous; or a map
// [batch, height, width, heads, head_dim]. In elements.
template <typename T>
struct TokenMap {
  T* data;
  int64_t batch, row, column;  // distances of neighbours
};

template <typename T>
struct WindowAttention {
  TokenMap<const T> qkv;
  const T* pad_token;   // [3, heads, head_dim], a token of padding; read where padding is attended only
  const T* bias;        // [heads, queries, keys] or null
  const T* bias_table;  // the same for small windows, [heads, keys, padded_to_vector(queries)]; or null
  const T* attn_scale;  // [heads] or null
  T* output;            // [batch, height, width, heads, head_dim]
  T* statistics;        // [2, batch, height, width, heads]: a query's largest score, 1 / sum of its weights
  WindowAxis rows, columns;
  WindowLayout layout;
  int64_t batch, heads, head_dim;
  T scale;  // of the scores
};

// Gradients of parameters are the sums over pieces, into which the windows of each head are cut whatever the number of
// threads: sums in a fixed order. Zeros at first; null where not needed.
template <typename T>
struct WindowAttentionBackward {
  WindowAttention<T> forward;
  TokenMap<const T> gradient;  // of the output
  T* grad_qkv;                 // [batch, height, width, 3, heads, head_dim], written whole
  T* grad_bias;                // [pieces, heads, queries, keys]; or as the bias table
  T* grad_pad_token;           // [pieces, 3, heads, head_dim]
  T* grad_attn_scale;          // [pieces, heads]
  int64_t pieces;
};

// The units begin <= i < end of window_count() * heads * query_units(), with the memory of a ForwardMemory; the tasks
// begin <= i < end of pieces * heads, with the memory of a BackwardMemory. Memory is aligned to 64 bytes and no other
// thread's.
ASVIT_FAST_FOR_EACH_ISA(window_attention, const WindowAttention<T>& problem, int64_t begin, int64_t end, char* memory)
ASVIT_FAST_FOR_EACH_ISA(window_attention_backward, const WindowAttentionBackward<T>& problem, int64_t begin,
                        int64_t end, char* memory)

namespace {  // one copy per including file, as in window_attention_taylor.h

constexpr int64_t kMaximumLanes = 16;
constexpr int64_t kGroup = 64;           // queries that go through the keys together
constexpr int64_t kKeyTile = 64;         // keys whose scores are in memory at a time
constexpr int64_t kUnit = 2 * kGroup;    // queries of one window that work is handed out in
constexpr int64_t kTableTokens = 256;    // up to which the bias is transposed for all windows at once
constexpr int64_t kRegions = 4;          // parts of a window that a shift along both sides brings together
constexpr double kRegionScore = -100.0;  // added to that of a query and a key in different regions

// Whether the bias of windows of so many tokens is transposed once, to [heads, keys, queries].
inline bool uses_bias_table(int64_t tokens) { return tokens <= kTableTokens; }

inline int64_t padded_to_vector(int64_t count) { return (count + kMaximumLanes - 1) / kMaximumLanes * kMaximumLanes; }

// ----------------------------------------------------------------------------------------------------------- windows

template <typename T>
inline int64_t window_count(const WindowAttention<T>& problem) {
  return problem.batch * axis_windows(problem.rows, problem.layout) * axis_windows(problem.columns, problem.layout);
}

template <typename T>
inline int64_t window_tokens(const WindowAttention<T>& problem) {
  return problem.rows.window * problem.columns.window;
}

template <typename T>
inline int64_t query_units(const WindowAttention<T>& problem) {
  return (window_tokens(problem) + kUnit - 1) / kUnit;
}

template <typename T>
inline int64_t map_tokens(const WindowAttention<T>& problem) {
  return problem.batch * problem.rows.size * problem.columns.size;
}

struct Token {
  int64_t row, column;  // on the map; row -1: padding
  int32_t place;        // in the whole window, as the bias counts
  int32_t region;       // 0 ... kRegions - 1

  bool is_padding() const { return row < 0; }
};

// The tokens of one window of one image.
struct TokenWindow {
  int64_t batch, count;
  Token* tokens;
  bool complete;  // places are 0, 1, ...
  bool regions;   // there is more than one
  bool padded;    // there is padding
};

template <typename T>
inline TokenWindow window_at(const WindowAttention<T>& problem, int64_t index, Token* tokens) {
  const int64_t across = axis_windows(problem.columns, problem.layout);
  const int64_t down = axis_windows(problem.rows, problem.layout);
  const AxisWindow columns(problem.columns, problem.layout, index % across);
  const AxisWindow rows(problem.rows, problem.layout, index / across % down);
  TokenWindow window = {index / across / down, rows.length * columns.length, tokens, true, false, false};
  window.complete = window.count == window_tokens(problem);
  for (int64_t i = 0; i < rows.length; ++i) {
    const AxisToken row = rows.token(i);
    for (int64_t j = 0; j < columns.length; ++j) {
      const AxisToken column = columns.token(j);
      const bool padding = row.position < 0 || column.position < 0;
      const auto width = static_cast<int32_t>(problem.columns.window);
      *tokens = {padding ? -1 : row.position, column.position, row.offset * width + column.offset,
                 2 * row.region + column.region};
      window.regions |= tokens->region != window.tokens->region;
      window.padded |= padding;
      ++tokens;
    }
  }
  return window;
}

// ------------------------------------------------------------------------------------------------------------ memory

// One head's operands of one window: [token][component], read in vectors and so with a vector's room at the end.
template <typename T>
struct PackedRows {
  int64_t tokens, padded_dim;

  explicit PackedRows(const WindowAttention<T>& problem)
      : tokens(window_tokens(problem)), padded_dim(padded_to_vector(problem.head_dim)) {}

  T* take(Arena& arena) const { return arena.take<T>(tokens * padded_dim + kMaximumLanes * padded_dim); }
};

template <typename T>
struct ForwardMemory {
  Token* tokens;                // of two windows
  T *queries, *keys, *values;   // [token][component]
  T* columns;                   // queries of a group, [component][query]
  T* scores;                    // of a group and a tile, [key][query]
  T* base;                      // what is added to them, [key][query]
  T* sums;                      // [query][padded_dim]
  T* column_sums;               // [component][query]
  T *maximum, *total, *factor;  // [query]
  T* means;                     // of the values of a region, [region][padded_dim]
  int64_t padded_dim;

  ForwardMemory(const WindowAttention<T>& problem, Arena& arena) {
    const PackedRows<T> rows(problem);
    padded_dim = rows.padded_dim;
    tokens = arena.take<Token>(2 * rows.tokens);
    queries = rows.take(arena);
    keys = rows.take(arena);
    values = rows.take(arena);
    columns = arena.take<T>(padded_dim * kGroup);
    scores = arena.take<T>(kKeyTile * kGroup);
    base = arena.take<T>(kKeyTile * kGroup);
    sums = arena.take<T>(kGroup * padded_dim);
    column_sums = arena.take<T>(padded_dim * kGroup);
    maximum = arena.take<T>(kGroup);
    total = arena.take<T>(kGroup);
    factor = arena.take<T>(kGroup);
    means = arena.take<T>(kRegions * padded_dim);
  }
};

template <typename T>
struct BackwardMemory {
  Token* tokens;                            // of two windows
  T *queries, *keys, *values, *gradients;   // [token][component]
  T *grad_keys, *grad_values;               // [key][padded_dim]
  T *query_columns, *gradient_columns;      // of a group, [component][query]
  T *weights, *scores;                      // of a group and a tile, [key][query]; scores: the gradients of
  T* base;                                  // [key][query]
  T* grad_queries;                          // [query][padded_dim]
  T* column_sums;                           // [component][query]
  T *maximum, *inverse, *delta, *products;  // [query]
  T* means;                                 // [region][padded_dim]
  int64_t padded_dim;

  BackwardMemory(const WindowAttention<T>& problem, Arena& arena) {
    const PackedRows<T> rows(problem);
    padded_dim = rows.padded_dim;
    tokens = arena.take<Token>(2 * rows.tokens);
    queries = rows.take(arena);
    keys = rows.take(arena);
    values = rows.take(arena);
    gradients = rows.take(arena);
    grad_keys = rows.take(arena);
    grad_values = rows.take(arena);
    query_columns = arena.take<T>(padded_dim * kGroup);
    gradient_columns = arena.take<T>(padded_dim * kGroup);
    weights = arena.take<T>(kKeyTile * kGroup);
    scores = arena.take<T>(kKeyTile * kGroup);
    base = arena.take<T>(kKeyTile * kGroup);
    grad_queries = arena.take<T>(kGroup * padded_dim);
    column_sums = arena.take<T>(padded_dim * kGroup);
    maximum = arena.take<T>(kGroup);
    inverse = arena.take<T>(kGroup);
    delta = arena.take<T>(kGroup);
    products = arena.take<T>(kGroup);
    means = arena.take<T>(kRegions * padded_dim);
  }
};

}  // namespace
}  // namespace asvit_fast
