// Rows of tokens: copied between the map and the memory of a thread, and transposed. Included as vector.h is.
#pragma once

#include "cpu/bfloat16_pairs.h"
#include "cpu/transpose.h"
#include "window_attention.h"

namespace asvit_fast {
namespace {

// Prefetches the channels offset <= j < offset + size of the tokens begin <= i < end, to be read or written. Always
// inlined: GCC drops calls of a function that does nothing else.
template <int write, typename Byte>
[[gnu::always_inline]] inline void prefetch(const TokenMap<Byte>& map, const TokenList& tokens, int64_t begin,
                                            int64_t end, int64_t offset, int64_t size) {
  constexpr int64_t line = 64;
  const int64_t bytes = size * element_bytes(map.type);
  for (int64_t i = begin; i < end; ++i) {
    if (tokens[i].is_padding()) continue;
    const char* row = map.at(tokens[i].index, offset);
    for (int64_t j = 0; j < bytes; j += line) __builtin_prefetch(row + j, write, 2);
  }
}

// Numbers [size] of a map that are neighbours, as those of type T.
template <typename T>
inline void read_row(const char* from, ScalarType type, int64_t size, T* to) {
  with_type<Float16, BFloat16>(
      type, [&](auto number) { convert_row(reinterpret_cast<const decltype(number)*>(from), size, to); });
}

template <typename T>
inline void write_row(const T* from, int64_t size, ScalarType type, char* to) {
  with_type<Float16, BFloat16>(type,
                               [&](auto number) { convert_row(from, size, reinterpret_cast<decltype(number)*>(to)); });
}

// One head's rows of a map; padding has those of `padding`.
template <typename T>
void pack_rows(const TokenMap<const char>& map, const TokenList& tokens, int64_t size, int64_t head, const T* padding,
               T* to) {
  with_type<Float16, BFloat16>(map.type, [&](auto number) {
    for (int64_t i = 0; i < tokens.count; ++i) {
      const Token& token = tokens[i];
      if (token.is_padding()) {
        convert_row(padding + head * size, size, to + i * size);
      } else {
        const char* from = map.at(token.index, head * size);
        convert_row(reinterpret_cast<const decltype(number)*>(from), size, to + i * size);
      }
    }
  });
}

// One head's rows of a bfloat16 map as pairs of components [token][pair], the last with a zero where `size` is odd.
inline void pack_rows(const TokenMap<const char>& map, const TokenList& tokens, int64_t size, int64_t head,
                      const float* padding, Pair* to) {
  const int64_t pairs = operand_count<Pair>(size);
  for (int64_t i = 0; i < tokens.count; ++i, to += pairs) {
    const Token& token = tokens[i];
    auto* const row = reinterpret_cast<BFloat16*>(to);
    if (size % 2 == 1) row[size] = {0};
    if (token.is_padding()) {
      convert_row(padding + head * size, size, row);
    } else {
      convert_row(reinterpret_cast<const BFloat16*>(map.at(token.index, head * size)), size, row);
    }
  }
}

// The same as pairs of tokens [pair][component], the last with zeros where their number is odd. `rows`: room for two
// tokens, in vectors.
inline void pack_row_pairs(const TokenMap<const char>& map, const TokenList& tokens, int64_t size, int64_t head,
                           const float* padding, BFloat16* rows, Pair* to) {
  const int64_t distance = (size + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  for (int64_t i = 0; i < tokens.count; i += 2, to += size) {
    for (int64_t j = 0; j < 2; ++j) {
      BFloat16* const row = rows + j * distance;
      if (i + j >= tokens.count) {
        for (int64_t component = 0; component < size; ++component) row[component] = {0};
      } else if (tokens[i + j].is_padding()) {
        convert_row(padding + head * size, size, row);
      } else {
        convert_row(reinterpret_cast<const BFloat16*>(map.at(tokens[i + j].index, head * size)), size, row);
      }
    }
    for (int64_t component = 0; component < size; component += kLanes<float>)
      store<Pair>(to + component, interleave(load_bits(rows + component), load_bits(rows + distance + component)));
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

// to [component][kGroup queries] = factor * rows [query][size], in whole vectors both ways. Pairs stay as they are.
template <typename Operand, typename T>
void transpose_to_columns(const Operand* rows, int64_t count, int64_t size, T factor, Operand* to) {
  for (int64_t i = 0; i < count; i += kLanes<Operand>)
    for (int64_t component = 0; component < size; component += kLanes<Operand>) {
      Vector<Operand> block[kLanes<Operand>];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<Operand>; ++lane)
        block[lane] = load<Operand>(rows + (i + lane) * size + component);
      transpose<Operand>(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<Operand>; ++lane) {
        if constexpr (!is_pair<Operand>) block[lane] *= factor;
        store<Operand>(to + (component + lane) * kGroup + i, block[lane]);
      }
    }
}

// to [query][padded_dim] = columns [component][kGroup queries], in whole vectors both ways.
template <typename T>
void transpose_to_rows(const T* columns, int64_t count, int64_t size, int64_t padded_dim, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    for (int64_t component = 0; component < size; component += kLanes<T>)
      transpose_block(columns + component * kGroup + i, kGroup, to + i * padded_dim + component, padded_dim);
}

}  // namespace
}  // namespace asvit_fast
