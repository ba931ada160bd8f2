// The maths of attention on series, for numbers (CUDA threads) and vectors of numbers (CPU lanes) alike.
//
// Scores, weights and sums are series in t, s(t) = s[0] + s[1] t + s[2] t^2 (Taylor coefficients: s'' = 2 s[2]), so
// that all products are Cauchy products. The weights are exp(s(t) - r(t)), where r, the reference, is the same for all
// keys of a row and cancels in
//
//   y(t) = sum exp(s - r) v / sum exp(s - r).
//
// r[0] is the row's maximum as for any softmax. r[1] and r[2] are running means of s[1] and s[2] under the weights:
// then the sums stay as small as the result, and what all scores of a row share cancels before it is squared. V is a
// number, or a vector of numbers of different rows.
#pragma once

#include "window_attention_taylor.h"

namespace asvit_fast {
namespace {

// Weight exp(x(t)) of a centred score x(t), given exp(x[0]); in place.
template <typename T, int orders, typename V>
ASVIT_FAST_HOST_DEVICE inline void exp_series(V* x, V exp0) {
  if constexpr (orders >= 2) x[2] = exp0 * (x[2] + T(0.5) * x[1] * x[1]);
  if constexpr (orders >= 1) x[1] = exp0 * x[1];
  x[0] = exp0;
}

// x(t) e(t), in place.
template <int orders, typename V>
ASVIT_FAST_HOST_DEVICE inline void multiply_series(V* x, const V* e) {
  if constexpr (orders >= 2) x[2] = x[2] * e[0] + x[1] * e[1] + x[0] * e[2];
  if constexpr (orders >= 1) x[1] = x[1] * e[0] + x[0] * e[1];
  x[0] = x[0] * e[0];
}

// x(t) / d(t), in place, given 1 / d[0].
template <int orders, typename V>
ASVIT_FAST_HOST_DEVICE inline void divide_series(V* x, const V* d, V inverse) {
  x[0] = x[0] * inverse;
  if constexpr (orders >= 1) x[1] = (x[1] - x[0] * d[1]) * inverse;
  if constexpr (orders >= 2) x[2] = (x[2] - x[1] * d[1] - x[0] * d[2]) * inverse;
}

// x(t) += a(t) b(t)
template <int orders, typename V, typename A, typename B>
ASVIT_FAST_HOST_DEVICE inline void add_product(V* x, const A* a, const B* b) {
  x[0] += a[0] * b[0];
  if constexpr (orders >= 1) {
    x[1] += a[0] * b[1];
    x[1] += a[1] * b[0];
  }
  if constexpr (orders >= 2) {
    x[2] += a[0] * b[2];
    x[2] += a[1] * b[1];
    x[2] += a[2] * b[0];
  }
}

// State of a row after some keys: the reference r(t) and the sum of all weights exp(s - r).
template <int orders, typename V>
struct SoftmaxState {
  V reference[orders + 1];
  V total[orders + 1];
};

// Total order 0 of the state after a look at further keys, whose weights relative to the new maximum sum up to
// `weights`; `decay` = exp(old maximum - new maximum). Never 0.
template <typename T, int orders, typename V>
ASVIT_FAST_HOST_DEVICE inline V next_total(const SoftmaxState<orders, V>& state, V decay, V weights) {
  constexpr T tiny = T(1e-30);  // as long as every key had the score -inf, the total is 0
  const V sum = decay * state.total[0] + weights;
  return sum > tiny ? sum : sum + tiny;
}

// Rescales the state to a new reference, given about 1 / next_total; `first` and `second` are the sums of the further
// keys' weights with s[1], s[2]. Returns in `factor` what sums relative to the old reference have to be multiplied
// with; the total already is.
template <typename T, int orders, typename V>
ASVIT_FAST_HOST_DEVICE inline void rescale_state(SoftmaxState<orders, V>& state, V decay, V inverse, V first, V second,
                                                 V* factor) {
  V* total = state.total;
  V* reference = state.reference;
  V shift[orders + 1] = {};
  for (int order = 1; order <= orders; ++order) {
    // the old keys' mean is taken to be the old reference, which it is but for rounding: any value near is as good
    const V mean = (decay * reference[order] * total[0] + (order == 1 ? first : second)) * inverse;
    shift[order] = reference[order] - mean;
    reference[order] = mean;
  }
  exp_series<T, orders>(shift, decay);
  for (int order = 0; order <= orders; ++order) factor[order] = shift[order];
  multiply_series<orders>(total, factor);
}

}  // namespace
}  // namespace asvit_fast
