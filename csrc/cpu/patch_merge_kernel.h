// Patch merging for one instruction set: neighbourhoods copied into rows and normalised there.
//
// Where a channel's numbers of the whole neighbourhood stand together, the copy is a transposition: vectors of
// channels, one for each token, are interleaved in registers, with empty vectors up to a power of two. What those leave
// behind each channel is overwritten by the next.
#pragma once

#include "cpu/transpose.h"
#include "patch_merge.h"

namespace asvit_fast {
namespace {

constexpr int kMaximumSlots = 32;  // tokens of a neighbourhood that are interleaved in registers

// --------------------------------------------------------------------------- interleaving

template <typename T, int... lane>
inline Vector<T> zip(Vector<T> a, Vector<T> b, Constant<0>, Integers<lane...>) {
  return __builtin_shufflevector(a, b, (lane / 2 + (lane & 1 ? kLanes<T> : 0))...);
}
template <typename T, int... lane>
inline Vector<T> zip(Vector<T> a, Vector<T> b, Constant<1>, Integers<lane...>) {
  return __builtin_shufflevector(a, b, (lane / 2 + kLanes<T> / 2 + (lane & 1 ? kLanes<T> : 0))...);
}
// x[slot][lane] becomes the sequence [lane][slot], cut into vectors: each step shuffles both halves of all the numbers
// into each other, which rotates the bits of their indices by one.
template <typename T, int slots, int step = 1>
inline void interleave(Vector<T> (&x)[slots]) {
  if constexpr (step < slots) {
    const typename FirstIntegers<kLanes<T>>::Type lanes;
    Vector<T> y[slots];
#pragma GCC unroll 32
    for (int i = 0; i < slots / 2; ++i) {
      y[2 * i] = zip<T>(x[i], x[i + slots / 2], Constant<0>(), lanes);
      y[2 * i + 1] = zip<T>(x[i], x[i + slots / 2], Constant<1>(), lanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i) x[i] = y[i];
    interleave<T, slots, step * 2>(x);
  }
}

// tokens[taps] of channels -> to [channels][taps]; at least a vector of channels. Null tokens are padding.
template <typename T, int slots>
void interleave_tokens(const T* const* tokens, int64_t taps, int64_t channels, T* to) {
  for (int64_t channel = 0; channel < channels; channel += kLanes<T>) {
    const int64_t first = channel + kLanes<T> <= channels ? channel : channels - kLanes<T>;
    Vector<T> x[slots];
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i) x[i] = i < taps && tokens[i] ? load<T>(tokens[i] + first) : Vector<T>{};
    interleave<T, slots>(x);
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i) {
      const int offset = i * kLanes<T>;  // in [lane][slot]
      if (offset % slots < taps) store<T>(to + (first + offset / slots) * taps + offset % slots, x[i]);
    }
  }
}

// `run` with the number of slots for a neighbourhood, 0 where numbers go one by one.
template <typename T, typename Run>
inline void with_slots(const Neighbourhoods& map, Run run) {
  const int64_t taps = map.kernel * map.kernel;
  if (map.channels < kLanes<T> || taps > kMaximumSlots) {
    run(Constant<0>());
  } else if (taps == 4) {
    run(Constant<4>());
  } else if (taps <= 16) {
    run(Constant<16>());
  } else {
    run(Constant<kMaximumSlots>());
  }
}

// --------------------------------------------------------------------------- neighbourhoods

struct OutputToken {
  int64_t image, row, column;
};

inline OutputToken output_token(const Neighbourhoods& map, int64_t index) {
  const int64_t row = index / map.out_width;
  return {row / map.out_height, row % map.out_height, index % map.out_width};
}

// Index of a token of the neighbourhood among the rows from `first_row` on, times channels; -1 for padding.
inline int64_t offset_of(const Neighbourhoods& map, int64_t first_row, const OutputToken& token, int64_t row,
                         int64_t column) {
  row += token.row * map.stride - map.top;
  column += token.column * map.stride - map.left;
  if (row < 0 || row >= map.height || column < 0 || column >= map.width) return -1;
  return ((token.image * map.height + row - first_row) * map.width + column) * map.channels;
}

// `count` numbers, or zeros where there is nothing to copy from. For so few a call of memcpy takes longer.
template <typename T>
inline void copy(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, from ? load<T>(from + i) : Vector<T>{});
  for (; i < count; ++i) to[i] = from ? from[i] : T(0);
}

template <typename T>
void copy_neighbourhood(const PatchMerge<T>& problem, const OutputToken& token, T* to) {
  const Neighbourhoods& map = problem.map;
  const int64_t kernel = map.kernel, taps = kernel * kernel, channels = map.channels;
  const auto source = [&](int64_t row, int64_t column) -> const T* {
    const int64_t offset = offset_of(map, problem.first_row, token, row, column);
    return offset < 0 ? nullptr : problem.tokens + offset;
  };
  if (map.channels_last) {
    for (int64_t i = 0; i < taps; ++i, to += channels) {
      copy(source(i % kernel, i / kernel), channels, to);
    }
    return;
  }
  with_slots<T>(map, [&](auto slots) {
    if constexpr (slots() > 0) {
      const T* tokens[kMaximumSlots];
      for (int64_t i = 0; i < taps; ++i) tokens[i] = source(i / kernel, i % kernel);
      interleave_tokens<T, slots()>(tokens, taps, channels, to);
    } else {
      for (int64_t i = 0; i < taps; ++i) {
        const T* from = source(i / kernel, i % kernel);
        for (int64_t c = 0; c < channels; ++c) to[c * taps + i] = from ? from[c] : T(0);
      }
    }
  });
}

// --------------------------------------------------------------------------- normalisation

// Sums of up to two functions, of vectors and of numbers, over 0 <= i < count.
template <typename T, typename Function>
inline void sums(int64_t count, Function function, T* first, T* second) {
  Vector<T> a[4] = {}, b[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= count; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) function(i + j * kLanes<T>, Vector<T>{}, a[j], b[j]);
  }
  for (; i + kLanes<T> <= count; i += kLanes<T>) function(i, Vector<T>{}, a[0], b[0]);
  T x = total<T>((a[0] + a[1]) + (a[2] + a[3])), y = total<T>((b[0] + b[1]) + (b[2] + b[3]));
  for (; i < count; ++i) function(i, T(0), x, y);
  *first = x;
  *second = y;
}

// A vector, or a number, at `from`.
template <typename T>
inline Vector<T> like(Vector<T>, const T* from) {
  return load<T>(from);
}
template <typename T>
inline T like(T, const T* from) {
  return *from;
}

// mean and 1 / standard deviation, of deviations from a first mean: E[x^2] - E[x]^2 would cancel.
template <typename T>
void find_statistics(const T* row, int64_t count, T eps, T* mean, T* rstd) {
  T sum, squares, unused;
  sums<T>(count, [row](int64_t i, auto kind, auto& a, auto&) { a += like<T>(kind, row + i); }, &sum, &unused);
  const T about = sum / static_cast<T>(count);
  sums<T>(
      count,
      [row, about](int64_t i, auto kind, auto& a, auto& b) {
        const auto x = like<T>(kind, row + i) - about;
        a += x;
        b += x * x;
      },
      &sum, &squares);
  const T rest = sum / static_cast<T>(count);  // what rounding left of the mean
  const T variance = squares / static_cast<T>(count) - rest * rest;
  *mean = about + rest;
  *rstd = T(1) / square_root((variance > T(0) || variance != variance ? variance : T(0)) + eps);
}

template <typename T>
void normalise(const PatchMerge<T>& problem, int64_t token, T* row) {
  const int64_t count = problem.map.features();
  const T mean = problem.mean[token], rstd = problem.rstd[token];
  const T *weight = problem.norm_weight, *bias = problem.norm_bias;
  const auto value = [&](int64_t i, auto kind) {
    auto x = (like<T>(kind, row + i) - mean) * rstd;
    if (problem.differentiate) return x;
    if (weight) x *= like<T>(kind, weight + i);
    if (bias) x += like<T>(kind, bias + i);
    return x;
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(row + i, value(i, Vector<T>{}));
  for (; i < count; ++i) row[i] = value(i, T(0));
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void patch_merge_rows(const PatchMerge<T>& problem, int64_t begin, int64_t end, T* rows) {
  const int64_t features = problem.map.features();
  for (int64_t token = begin; token < end; ++token, rows += features) {
    copy_neighbourhood(problem, output_token(problem.map, token), rows);
    if (!problem.differentiate)
      find_statistics(rows, features, problem.eps, problem.mean + token, problem.rstd + token);
    normalise(problem, token, rows);
  }
}
template void patch_merge_rows(const PatchMerge<float>&, int64_t, int64_t, float*);
template void patch_merge_rows(const PatchMerge<double>&, int64_t, int64_t, double*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
