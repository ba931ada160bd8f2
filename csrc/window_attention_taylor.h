// Softmax attention inside windows on (x, x', x''): what every implementation computes, and which tokens a window has.
// No torch header.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/for_each_isa.h"
#include "window_geometry.h"

namespace asvit_fast {

// Distances between neighbours along each dimension of [orders + 1, batch, height, width, heads, head_dim], in
// elements.
struct AttentionStrides {
  int64_t order, batch, row, column, head, component;
};

template <typename T>
struct AttentionOperand {
  const T* data;
  AttentionStrides strides;
};

template <typename T>
struct WindowAttentionTaylor {
  AttentionOperand<T> q, k, v;  // [orders + 1, batch, height, width, heads, head_dim]
  const T* bias;                // [heads, tokens, tokens], tokens = rows.window * columns.window; or null
  T* output;                    // [orders + 1, batch, height, width, heads, head_dim], contiguous
  WindowAxis rows, columns;
  int64_t batch, heads, head_dim;
  int orders;  // 0, 1 or 2
  T scale;
};

// CPU: the units begin <= i < end of window_count() * units_per_window(), with the memory of an AttentionMemory,
// aligned to 64 bytes, to itself.
ASVIT_FAST_FOR_EACH_ISA(window_attention_taylor, const WindowAttentionTaylor<T>& problem, int64_t begin, int64_t end,
                        char* memory)

// CUDA: launches on `stream` (a cudaStream_t) and returns; head_dim is at most kMaximumHeadDimCuda.
constexpr int64_t kMaximumHeadDimCuda = 256;
void window_attention_taylor_cuda(const WindowAttentionTaylor<float>& problem, void* stream);
void window_attention_taylor_cuda(const WindowAttentionTaylor<double>& problem, void* stream);

namespace {  // one copy per including file: nothing compiled for one instruction set may be linked into another

// The tokens of one attention: a rectangle of the map, one image, one head.
struct AttentionWindow {
  int64_t batch, head;
  WindowSegment rows, columns;

  ASVIT_FAST_HOST_DEVICE int64_t tokens() const { return rows.length * columns.length; }
};

template <typename T>
ASVIT_FAST_HOST_DEVICE inline int64_t window_count(const WindowAttentionTaylor<T>& problem) {
  return problem.batch * segment_count(problem.rows) * segment_count(problem.columns) * problem.heads;
}

template <typename T>
ASVIT_FAST_HOST_DEVICE inline AttentionWindow window_at(const WindowAttentionTaylor<T>& problem, int64_t index) {
  const int64_t head = index % problem.heads;
  index /= problem.heads;
  const int64_t columns = segment_count(problem.columns);
  const WindowSegment column = segment_at(problem.columns, index % columns);
  index /= columns;
  const int64_t rows = segment_count(problem.rows);
  return {index / rows, head, segment_at(problem.rows, index % rows), column};
}

// Row and column of a token on the map less its rectangle's start. `token` counts along the rows of the rectangle.
struct TokenPlace {
  int64_t row, column;
};

ASVIT_FAST_HOST_DEVICE inline TokenPlace place_of(const AttentionWindow& window, int64_t token) {
  // a window has fewer than 2^32 tokens, and 32-bit division is several times faster
  const auto length = static_cast<uint32_t>(window.columns.length), index = static_cast<uint32_t>(token);
  return {index / length, index % length};
}

// Where order 0, component 0 of a token lies.
ASVIT_FAST_HOST_DEVICE inline int64_t token_offset(const AttentionWindow& window, const AttentionStrides& strides,
                                                   int64_t token) {
  const TokenPlace place = place_of(window, token);
  return window.batch * strides.batch + (window.rows.start + place.row) * strides.row +
         (window.columns.start + place.column) * strides.column + window.head * strides.head;
}

// The token's place in its whole window, as the bias counts.
ASVIT_FAST_HOST_DEVICE inline int64_t token_in_window(const AttentionWindow& window, int64_t window_columns,
                                                      int64_t token) {
  const TokenPlace place = place_of(window, token);
  return (window.rows.offset + place.row) * window_columns + window.columns.offset + place.column;
}

// Of a window: no more than the map has, however large windows are.
template <typename T>
ASVIT_FAST_HOST_DEVICE inline int64_t most_tokens(const WindowAttentionTaylor<T>& problem) {
  const WindowAxis &rows = problem.rows, &columns = problem.columns;
  return (rows.window < rows.size ? rows.window : rows.size) *
         (columns.window < columns.size ? columns.window : columns.size);
}

// Work is handed out in units of neighbouring queries of one window. A unit may lie beyond the window's last query.
constexpr int64_t kQueriesPerUnit = 128;

template <typename T>
ASVIT_FAST_HOST_DEVICE inline int64_t units_per_window(const WindowAttentionTaylor<T>& problem) {
  return (most_tokens(problem) + kQueriesPerUnit - 1) / kQueriesPerUnit;
}

template <typename T>
ASVIT_FAST_HOST_DEVICE inline AttentionStrides output_strides(const WindowAttentionTaylor<T>& problem) {
  const int64_t column = problem.heads * problem.head_dim, row = problem.columns.size * column;
  const int64_t batch = problem.rows.size * row;
  return {problem.batch * batch, batch, row, column, problem.head_dim, 1};
}

// Memory of one CPU thread: a vector of queries and its sums, the keys and the values of one window in the order in
// which they are read.
template <typename T>
struct AttentionMemory {
  int64_t padded_dim;
  T* queries;  // [component][order][lane]
  T* sums;     // [component][order][lane]
  T* keys;     // [key][component][order], zeros up to a whole block of keys
  T* values;   // [component block][key][order][component in the block]

  AttentionMemory(const WindowAttentionTaylor<T>& problem, Arena& arena) {
    const int64_t tokens = most_tokens(problem), orders = problem.orders + 1;
    padded_dim = (problem.head_dim + 3) / 4 * 4;
    queries = arena.take<T>(padded_dim * orders * 16);  // no vector has more lanes
    sums = arena.take<T>(padded_dim * orders * 16);
    keys = arena.take<T>((tokens + 15) / 16 * 16 * problem.head_dim * orders);  // no block has more keys
    values = arena.take<T>(tokens * padded_dim * orders);
  }
};

}  // namespace
}  // namespace asvit_fast
