// Taylor rule of an elementwise function f, for rows (x, x', x''):
//   y = f(x),  y' = f'(x) x',  y'' = f'(x) x'' + f''(x) x'^2      (derivatives with respect to t, not divided by
//   factorials)
//
// A function is a type with `template <typename T> static Derivatives<T> at(Vector<T> x)`. See vector.h for who may
// include this.
#pragma once

#include "cpu/vector.h"
#include "gelu_taylor.h"

namespace asvit_fast {
namespace {

template <typename T>
struct Derivatives {
  Vector<T> value, first, second;
};

// One vector of columns. `stride` is the distance between rows, in elements.
template <typename Function, int orders, typename T>
inline void taylor_columns(const T* input, int64_t input_stride, T* output, int64_t output_stride) {
  const Derivatives<T> f = Function::template at<T>(load<T>(input));
  store<T>(output, f.value);
  if constexpr (orders >= 1) {
    const Vector<T> x1 = load<T>(input + input_stride);
    store<T>(output + output_stride, f.first * x1);
    if constexpr (orders >= 2) {
      const Vector<T> x2 = load<T>(input + 2 * input_stride);
      store<T>(output + 2 * output_stride, f.first * x2 + f.second * (x1 * x1));
    }
  }
}

template <typename Function, int orders, typename T>
void taylor_range(const TaylorRows<T>& rows, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<T>;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes)
    taylor_columns<Function, orders, T>(rows.input + i, rows.count, rows.output + i, rows.count);
  if (i == end) return;
  // The rest goes through a full vector too: a value's result never depends on where it stands.
  T input[(orders + 1) * lanes] = {}, output[(orders + 1) * lanes];
  const size_t bytes = static_cast<size_t>(end - i) * sizeof(T);
  for (int order = 0; order <= orders; ++order)
    std::memcpy(input + order * lanes, rows.input + order * rows.count + i, bytes);
  taylor_columns<Function, orders, T>(input, lanes, output, lanes);
  for (int order = 0; order <= orders; ++order)
    std::memcpy(rows.output + order * rows.count + i, output + order * lanes, bytes);
}

template <typename Function, typename T>
void unary_taylor(const TaylorRows<T>& rows, int64_t begin, int64_t end) {
  switch (rows.orders) {
    case 0:
      return taylor_range<Function, 0>(rows, begin, end);
    case 1:
      return taylor_range<Function, 1>(rows, begin, end);
    default:
      return taylor_range<Function, 2>(rows, begin, end);
  }
}

}  // namespace
}  // namespace asvit_fast
