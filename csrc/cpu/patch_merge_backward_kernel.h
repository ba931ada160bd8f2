// The backward pass of patch merging for one instruction set.
#pragma once

#include "cpu/patch_merge_kernel.h"

namespace asvit_fast {
namespace {

template <typename T, int odd, int... lane>
inline Vector<T> every_other(Vector<T> a, Vector<T> b, Constant<odd>, Integers<lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + odd)...);
}

// The inverse of interleave.
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

template <typename T>
inline void add(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(to + i, load<T>(to + i) + load<T>(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

// The adjoint of copy_neighbourhood.
template <typename T>
void add_neighbourhood(const Neighbourhoods& map, const OutputToken& token, const T* from, T* workspace,
                       T* grad_tokens) {
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
    if (offset >= 0) add(by_token + i * channels, channels, grad_tokens + offset);
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

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void patch_merge_gradient(const PatchMerge<T>& problem, int64_t begin, int64_t end, const T* rows, const T* gradients,
                          T* workspace, T* grad_tokens) {
  const int64_t features = problem.map.features();
  T* by_token = workspace + features + kRowSlack;
  for (int64_t token = begin; token < end; ++token, rows += features, gradients += features) {
    differentiate_row(problem, problem.rstd[token], rows, gradients, workspace);
    add_neighbourhood(problem.map, output_token(problem.map, token), workspace, by_token, grad_tokens);
  }
}
template void patch_merge_gradient(const PatchMerge<float>&, int64_t, int64_t, const float*, const float*, float*,
                                   float*);
template void patch_merge_gradient(const PatchMerge<double>&, int64_t, int64_t, const double*, const double*, double*,
                                   double*);

// One pass over the weight.
template <typename T>
void patch_merge_parameters(const PatchMergeParameters<T>& problem, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) problem.grad_norm_weight[i] = problem.grad_norm_bias[i] = T(0);
  for (int64_t output = 0; output < problem.outputs; ++output) {
    const T* weight = problem.weight + output * problem.features;
    T* product = problem.grad_weight + output * problem.features;
    const T total = problem.total[output];
    const auto step = [&](int64_t i, auto kind, auto put) {
      const auto w = like<T>(kind, weight + i), p = like<T>(kind, product + i);
      put(problem.grad_norm_weight + i, like<T>(kind, problem.grad_norm_weight + i) + w * p);
      put(problem.grad_norm_bias + i, like<T>(kind, problem.grad_norm_bias + i) + w * total);
      const auto scaled = p * like<T>(kind, problem.norm_weight + i);
      put(product + i, problem.norm_bias ? scaled + like<T>(kind, problem.norm_bias + i) * total : scaled);
    };
    int64_t i = begin;
    for (; i + kLanes<T> <= end; i += kLanes<T>) step(i, Vector<T>{}, [](T* to, Vector<T> x) { store<T>(to, x); });
    for (; i < end; ++i) step(i, T(0), [](T* to, T x) { *to = x; });
  }
}
template void patch_merge_parameters(const PatchMergeParameters<float>&, int64_t, int64_t);
template void patch_merge_parameters(const PatchMergeParameters<double>&, int64_t, int64_t);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
