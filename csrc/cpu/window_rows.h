// Rows of tokens: copied between the map and the memory of a thread, and transposed. Included as vector.h is.
#pragma once

#include "cpu/transpose.h"
#include "cpu/vector.h"
#include "window_attention.h"

namespace asvit_fast {
namespace {

template <typename T>
inline void copy_row(const T* from, int64_t size, T* to) {
  for_each_width<T>(size, [&](int64_t i, auto width) { std::memcpy(to + i, from + i, width() * sizeof(T)); });
}

// Prefetches the channels offset <= j < offset + size of the tokens begin <= i < end, to be read or written. Always
// inlined: GCC drops calls of a function that does nothing else.
template <int write, typename T>
[[gnu::always_inline]] inline void prefetch(const TokenMap<T>& map, const TokenList& tokens, int64_t begin, int64_t end,
                                            int64_t offset, int64_t size) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = begin; i < end; ++i) {
    if (tokens[i].is_padding()) continue;
    const T* row = map.data + tokens[i].index * map.distance + offset;
    for (int64_t j = 0; j < size; j += line) __builtin_prefetch(row + j, write, 2);
  }
}

// One head's rows of a map; padding has those of `padding`.
template <typename T>
void pack_rows(const TokenMap<const T>& map, const TokenList& tokens, int64_t size, int64_t head, const T* padding,
               T* to) {
  for (int64_t i = 0; i < tokens.count; ++i, to += size) {
    const Token& token = tokens[i];
    const T* from = token.is_padding() ? padding : map.data + token.index * map.distance;
    copy_row(from + head * size, size, to);
  }
}

// Queries, keys and values of one head.
template <typename T>
void pack_qkv(const WindowAttention<T>& problem, const TokenWindow& window, int64_t head, T* queries, T* keys,
              T* values) {
  const int64_t size = problem.head_dim, part = problem.heads * size;
  pack_rows(problem.q, window.queries, size, head, problem.pad_token, queries);
  pack_rows(problem.k, window.keys, size, head, problem.pad_token + part, keys);
  pack_rows(problem.v, window.keys, size, head, problem.pad_token + 2 * part, values);
}

// The tokens of the current window and of the next.
template <typename T>
class Windows {
 public:
  Windows(const WindowAttention<T>& problem, Token* tokens) : problem_(problem), tokens_(tokens) {}

  const TokenWindow& at(int64_t index) { return windows_[slot_of(index)]; }

  // Leaves the window `index` as it is.
  const TokenWindow& next(int64_t index, int64_t following) {
    current_ = slot_of(index);
    return windows_[slot_of(following)];
  }

 private:
  int slot_of(int64_t index) {
    for (int slot = 0; slot < 2; ++slot)
      if (indices_[slot] == index) return slot;
    const int slot = 1 - current_;
    indices_[slot] = index;
    windows_[slot] = window_at(problem_, index, tokens_ + slot * (window_tokens(problem_) + window_keys(problem_)));
    return slot;
  }

  const WindowAttention<T>& problem_;
  Token* tokens_;
  TokenWindow windows_[2] = {};
  int64_t indices_[2] = {-1, -1};
  int current_ = 0;
};

// to [component][kGroup queries] = factor * rows [query][size], in whole vectors both ways.
template <typename T>
void transpose_to_columns(const T* rows, int64_t count, int64_t size, T factor, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    for (int64_t component = 0; component < size; component += kLanes<T>) {
      Vector<T> block[kLanes<T>];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<T>; ++lane) block[lane] = load<T>(rows + (i + lane) * size + component);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<T>; ++lane) store<T>(to + (component + lane) * kGroup + i, factor * block[lane]);
    }
}

// to [query][padded_dim] = columns [component][kGroup queries], in whole vectors both ways.
template <typename T>
void transpose_to_rows(const T* columns, int64_t count, int64_t size, int64_t padded_dim, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    for (int64_t component = 0; component < size; component += kLanes<T>) {
      Vector<T> block[kLanes<T>];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<T>; ++lane) block[lane] = load<T>(columns + (component + lane) * kGroup + i);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<T>; ++lane) store<T>(to + (i + lane) * padded_dim + component, block[lane]);
    }
}

}  // namespace
}  // namespace asvit_fast
