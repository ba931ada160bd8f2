// The Taylor rule of softmax for one instruction set. With <> the mean under p and d = s' - <s'>, e = s'' - <s''>:
//   p = softmax(s),  p' = p d,  p'' = p (e + d^2 - <e + d^2>)
// One exp for all orders. The means are taken in two steps, so that what all of s' or s'' have in common cancels. A row
// is read four times, from the cache but for the first. Where p is 0 (s = -inf) so are the derivatives, whatever s'.
#pragma once

#include "cpu/taylor_row.h"
#include "softmax_taylor.h"

namespace asvit_fast {
namespace {

template <int orders, typename T>
inline void softmax_row(const TaylorRow<T>& row) {
  constexpr T infinity = T(__builtin_inf());
  Vector<T> maxima = broadcast<T>(-infinity);
  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<T> s = lanes.only(row.load_from(0, i), -infinity);
    maxima = s > maxima ? s : maxima;
  });
  const T maximum = largest<T>(maxima);

  Vector<T> weights = {}, sums[orders + 1] = {};  // exp(s - maximum), and the derivatives of s under it
  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<T> weight = lanes.only(exp_negative<T>(row.load_from(0, i) - maximum));
    lanes.store_to(row.out(0, i), weight);
    weights += weight;
    for (int k = 1; k <= orders; ++k) sums[k] += weight * (weight == T(0) ? Vector<T>{} : row.load_from(k, i));
  });
  const T inverse = T(1) / total<T>(weights);
  T means[orders + 1];  // <s'>, <s''>, up to the correction below
  for (int k = 1; k <= orders; ++k) means[k] = total<T>(sums[k]) * inverse;

  // The derivative of order k less its mean where the weight is not 0.
  const auto subtract_weighted_mean = [&](int k, int64_t i, Vector<T> weight) __attribute__((always_inline)) {
    return weight == T(0) ? Vector<T>{} : row.load_from(k, i) - means[k];
  };
  Vector<T> first_sum = {}, second_sum = {};
  if constexpr (orders >= 1)
    for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vector<T> weight = lanes.only(load<T>(row.out(0, i)));
      const Vector<T> d = subtract_weighted_mean(1, i, weight);
      first_sum += weight * d;
      if constexpr (orders >= 2) second_sum += weight * (subtract_weighted_mean(2, i, weight) + d * d);
    });
  const T first_mean = total<T>(first_sum) * inverse;                              // what <s'> lacked
  const T second_mean = total<T>(second_sum) * inverse - first_mean * first_mean;  // <e + d^2>

  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<T> weight = load<T>(row.out(0, i));
    const Vector<T> p = weight * inverse;
    lanes.store_to(row.out(0, i), p);
    if constexpr (orders >= 1) {
      const Vector<T> d = subtract_weighted_mean(1, i, weight) - first_mean;
      lanes.store_to(row.out(1, i), p * d);
      if constexpr (orders >= 2)
        lanes.store_to(row.out(2, i), p * (subtract_weighted_mean(2, i, weight) + d * d - second_mean));
    }
  });
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void softmax_taylor(const TaylorMatrix<T>& matrix, int64_t begin, int64_t end) {
  with_orders(matrix.orders, [&](auto number) {
    constexpr int orders = number();
    for_each_row<orders>(matrix, begin, end, [](const TaylorRow<T>& row) { softmax_row<orders>(row); });
  });
}
template void softmax_taylor(const TaylorMatrix<float>&, int64_t, int64_t);
template void softmax_taylor(const TaylorMatrix<double>&, int64_t, int64_t);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
