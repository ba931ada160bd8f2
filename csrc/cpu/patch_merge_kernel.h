// Patch merging for one instruction set: neighbourhoods copied into rows and normalised there, and the way back.
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
template <typename T, int odd, int... lane>
inline Vector<T> every_other(Vector<T> a, Vector<T> b, Constant<odd>, Integers<lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + odd)...);
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

// The inverse.
template <typename T, int slots, int step = 1>
inline void separate(Vector<T> (&x)[slots]) {
  if constexpr (step < slots) {
    const typename FirstIntegers<kLanes<T>>::Type lanes;
    Vector<T> y[slots];
#pragma GCC unroll 32
    for (int i = 0; i < slots / 2; ++i) {
      y[i] = every_other<T>(x[2 * i], x[2 * i + 1], Constant<0>(), lanes);
      y[i + slots / 2] = every_other<T>(x[2 * i], x[2 * i + 1], Constant<1>(), lanes);
    }
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i) x[i] = y[i];
    separate<T, slots, step * 2>(x);
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

// [channels][taps] -> to [taps][channels]; reads past the end of `from`, which has the slack.
template <typename T, int slots>
void separate_tokens(const T* from, int64_t taps, int64_t channels, T* to) {
  for (int64_t channel = 0; channel < channels; channel += kLanes<T>) {
    const int64_t first = channel + kLanes<T> <= channels ? channel : channels - kLanes<T>;
    Vector<T> x[slots];
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i) {
      const int offset = i * kLanes<T>;
      x[i] = offset % slots < taps ? load<T>(from + (first + offset / slots) * taps + offset % slots) : Vector<T>{};
    }
    separate<T, slots>(x);
#pragma GCC unroll 32
    for (int i = 0; i < slots; ++i)
      if (i < taps) store<T>(to + i * channels + first, x[i]);
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

template <typename T>
inline void add(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

// The adjoint of copy_neighbourhood.
template <typename T>
void add_neighbourhood(const Neighbourhoods& map, const OutputToken& token, const T* from, T* workspace, T* to_tokens) {
  const int64_t kernel = map.kernel, taps = kernel * kernel, channels = map.channels;
  const T* by_token = from;  // [taps][channels]
  if (!map.channels_last) {
    by_token = workspace;
    with_slots<T>(map, [&](auto slots) {
      if constexpr (slots() > 0) {
        separate_tokens<T, slots()>(from, taps, channels, workspace);
      } else {
        for (int64_t i = 0; i < taps; ++i)
          for (int64_t c = 0; c < channels; ++c) workspace[i * channels + c] = from[c * taps + i];
      }
    });
  }
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t row = map.channels_last ? i % kernel : i / kernel,
                  column = map.channels_last ? i / kernel : i % kernel;
    const int64_t offset = offset_of(map, 0, token, row, column);
    if (offset >= 0) add(by_token + i * channels, channels, to_tokens + offset);
  }
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

// With g = norm_weight * gradient and x the normalised row: rstd (g - <g> - x <g x>), <.> the mean over features.
template <typename T>
void differentiate_row(const PatchMerge<T>& problem, T rstd, const T* row, const T* gradient, T* to) {
  const int64_t count = problem.map.features();
  const T* weight = problem.norm_weight;
  T mean, along;
  sums<T>(
      count,
      [=](int64_t i, auto kind, auto& a, auto& b) {
        auto g = like<T>(kind, gradient + i);
        if (weight) g *= like<T>(kind, weight + i);
        a += g;
        b += g * like<T>(kind, row + i);
      },
      &mean, &along);
  mean /= static_cast<T>(count);
  along /= static_cast<T>(count);
  const auto value = [&](int64_t i, auto kind) {
    auto g = like<T>(kind, gradient + i);
    if (weight) g *= like<T>(kind, weight + i);
    return (g - mean - like<T>(kind, row + i) * along) * rstd;
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, value(i, Vector<T>{}));
  for (; i < count; ++i) to[i] = value(i, T(0));
}

template <typename T>
void patch_merge_gradient(const PatchMerge<T>& problem, int64_t begin, int64_t end, const T* rows, const T* gradients,
                          T* workspace, T* to_tokens) {
  const int64_t features = problem.map.features();
  T* by_token = workspace + features + kRowSlack;
  for (int64_t token = begin; token < end; ++token, rows += features, gradients += features) {
    differentiate_row(problem, problem.rstd[token], rows, gradients, workspace);
    add_neighbourhood(problem.map, output_token(problem.map, token), workspace, by_token, to_tokens);
  }
}

// One pass over the weight.
template <typename T>
void patch_merge_parameters(const PatchMergeParameters<T>& problem, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) problem.to_norm_weight[i] = problem.to_norm_bias[i] = T(0);
  for (int64_t output = 0; output < problem.outputs; ++output) {
    const T* weight = problem.weight + output * problem.features;
    T* product = problem.to_weight + output * problem.features;
    const T total = problem.total[output];
    const auto step = [&](int64_t i, auto kind, auto put) {
      const auto w = like<T>(kind, weight + i), p = like<T>(kind, product + i);
      put(problem.to_norm_weight + i, like<T>(kind, problem.to_norm_weight + i) + w * p);
      put(problem.to_norm_bias + i, like<T>(kind, problem.to_norm_bias + i) + w * total);
      const auto scaled = p * like<T>(kind, problem.norm_weight + i);
      put(product + i, problem.norm_bias ? scaled + like<T>(kind, problem.norm_bias + i) * total : scaled);
    };
    int64_t i = begin;
    for (; i + kLanes<T> <= end; i += kLanes<T>) step(i, Vector<T>{}, [](T* to, Vector<T> x) { store<T>(to, x); });
    for (; i < end; ++i) step(i, T(0), [](T* to, T x) { *to = x; });
  }
}

}  // namespace
}  // namespace asvit_fast

// The entry points, for the namespace of the instruction set.
#define ASVIT_FAST_PATCH_MERGE_KERNELS                                                                             \
  void patch_merge_rows_f32(const PatchMerge<float>& problem, int64_t begin, int64_t end, float* rows) {           \
    patch_merge_rows(problem, begin, end, rows);                                                                   \
  }                                                                                                                \
  void patch_merge_rows_f64(const PatchMerge<double>& problem, int64_t begin, int64_t end, double* rows) {         \
    patch_merge_rows(problem, begin, end, rows);                                                                   \
  }                                                                                                                \
  void patch_merge_gradient_f32(const PatchMerge<float>& problem, int64_t begin, int64_t end, const float* rows,   \
                                const float* gradients, float* workspace, float* to_tokens) {                      \
    patch_merge_gradient(problem, begin, end, rows, gradients, workspace, to_tokens);                              \
  }                                                                                                                \
  void patch_merge_gradient_f64(const PatchMerge<double>& problem, int64_t begin, int64_t end, const double* rows, \
                                const double* gradients, double* workspace, double* to_tokens) {                   \
    patch_merge_gradient(problem, begin, end, rows, gradients, workspace, to_tokens);                              \
  }                                                                                                                \
  void patch_merge_parameters_f32(const PatchMergeParameters<float>& problem, int64_t begin, int64_t end) {        \
    patch_merge_parameters(problem, begin, end);                                                                   \
  }                                                                                                                \
  void patch_merge_parameters_f64(const PatchMergeParameters<double>& problem, int64_t begin, int64_t end) {       \
    patch_merge_parameters(problem, begin, end);                                                                   \
  }
