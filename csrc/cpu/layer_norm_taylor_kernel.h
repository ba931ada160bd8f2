// The Taylor rule of LayerNorm for one instruction set. With c = x - <x>, r = (<c c> + eps)^-1/2 and u = r c in every
// order, a = <u u'>, b = <u' u'> + <u u''>:
//   y = u,  y' = u' - a u,  y'' = u'' - 2 a u' + (3 a^2 - b) u
// A row is read three times, from the cache but for the first: mean, products, result.
#pragma once

#include "cpu/taylor_row.h"
#include "layer_norm_taylor.h"

namespace asvit_fast {
namespace {

template <int orders, typename T>
inline void layer_norm_row(const TaylorRow<T>& row, const T* weight, const T* bias, T eps) {
  const T inverse_size = T(1) / static_cast<T>(row.size);
  Vector<T> sums[orders + 1] = {};
  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    for (int k = 0; k <= orders; ++k) sums[k] += lanes.only(row.load_from(k, i));
  });
  T means[orders + 1];
  for (int k = 0; k <= orders; ++k) means[k] = total<T>(sums[k]) * inverse_size;

  Vector<T> square = {}, cross = {}, mixed = {};  // c c, c c', c' c' + c c''
  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<T> c = lanes.only(row.load_from(0, i) - means[0]);
    square += c * c;
    if constexpr (orders >= 1) {
      const Vector<T> c1 = lanes.only(row.load_from(1, i) - means[1]);
      cross += c * c1;
      if constexpr (orders >= 2) mixed += c1 * c1 + c * lanes.only(row.load_from(2, i) - means[2]);
    }
  });
  const T variance = total<T>(square) * inverse_size + eps;
  const T r = T(1) / square_root(variance);
  const T a = total<T>(cross) * inverse_size / variance;
  const T b = total<T>(mixed) * inverse_size / variance;

  for_each_vector<T>(row.size, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vector<T> scale = weight ? load<T>(weight + i) * r : broadcast<T>(r);
    const Vector<T> u = (row.load_from(0, i) - means[0]) * scale;
    lanes.store_to(row.out(0, i), bias ? u + load<T>(bias + i) : u);
    if constexpr (orders >= 1) {
      const Vector<T> u1 = (row.load_from(1, i) - means[1]) * scale;
      lanes.store_to(row.out(1, i), u1 - a * u);
      if constexpr (orders >= 2) {
        const Vector<T> u2 = (row.load_from(2, i) - means[2]) * scale;
        lanes.store_to(row.out(2, i), u2 - (a + a) * u1 + (T(3) * a * a - b) * u);
      }
    }
  });
}

// A copy of parameters with room for a vector; null for none.
template <typename T>
inline const T* with_room(const T* parameters, int64_t size, T (&room)[kLanes<T>]) {
  if (parameters == nullptr || size >= kLanes<T>) return parameters;
  std::memcpy(room, parameters, static_cast<size_t>(size) * sizeof(T));
  return room;
}

template <int orders, typename T>
void layer_norm_rows(const TaylorMatrix<T>& matrix, const T* weight, const T* bias, T eps, int64_t begin, int64_t end) {
  T weight_room[kLanes<T>] = {}, bias_room[kLanes<T>] = {};
  weight = with_room(weight, matrix.size, weight_room);
  bias = with_room(bias, matrix.size, bias_room);
  for_each_row<orders>(matrix, begin, end,
                       [&](const TaylorRow<T>& row) { layer_norm_row<orders>(row, weight, bias, eps); });
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void layer_norm_taylor(const TaylorMatrix<T>& matrix, const T* weight, const T* bias, double eps, int64_t begin,
                       int64_t end) {
  with_orders(matrix.orders,
              [&](auto orders) { layer_norm_rows<orders()>(matrix, weight, bias, static_cast<T>(eps), begin, end); });
}
template void layer_norm_taylor(const TaylorMatrix<float>&, const float*, const float*, double, int64_t, int64_t);
template void layer_norm_taylor(const TaylorMatrix<double>&, const double*, const double*, double, int64_t, int64_t);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
