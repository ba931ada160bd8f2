// Taylor rule of an elementwise function f, for rows (x, x', x''):
//   y = f(x),  y' = f'(x) x',  y'' = f'(x) x'' + f''(x) x'^2      (derivatives with respect to t, not divided by
//   factorials)
//
// See vector.h for who may include this.
#pragma once

#include "constant.h"
#include "cpu/vector_math.h"
#include "unary_functions.h"
#include "unary_taylor.h"

namespace asvit_fast {
namespace {

// One vector of columns. Strides are distances between rows, in elements; `bias` is read only if `biased`.
template <typename Function, int orders, bool biased, typename T>
inline void taylor_columns(const T* input, int64_t input_stride, const T* bias, T* output, int64_t output_stride) {
  Vector<T> x = load<T>(input);
  if constexpr (biased) x += load<T>(bias);
  const Derivatives<Vector<T>> f = Function::at(x);
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

// The columns begin <= i < end; `bias` is that of the first one.
template <typename Function, int orders, bool biased, typename T>
inline void taylor_range(const TaylorRows<T>& rows, const T* bias, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<T>;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes)
    taylor_columns<Function, orders, biased, T>(rows.input + i, rows.count, biased ? bias + (i - begin) : nullptr,
                                                rows.output + i, rows.count);
  if (i == end) return;
  // The rest goes through a full vector too: a value's result never depends on where it stands.
  T input[(orders + 1) * lanes] = {}, output[(orders + 1) * lanes], bias_lanes[lanes] = {};
  const size_t bytes = static_cast<size_t>(end - i) * sizeof(T);
  for (int order = 0; order <= orders; ++order)
    std::memcpy(input + order * lanes, rows.input + order * rows.count + i, bytes);
  if constexpr (biased) std::memcpy(bias_lanes, bias + (i - begin), bytes);
  taylor_columns<Function, orders, biased, T>(input, lanes, bias_lanes, output, lanes);
  for (int order = 0; order <= orders; ++order)
    std::memcpy(rows.output + order * rows.count + i, output + order * lanes, bytes);
}

template <typename Function, int orders, typename T>
void taylor_biased(const TaylorRows<T>& rows, int64_t begin, int64_t end) {
  if (rows.bias == nullptr) return taylor_range<Function, orders, false>(rows, rows.bias, begin, end);
  while (begin < end) {  // up to the next wrap of the bias
    const int64_t channel = begin % rows.channels;
    const int64_t wrap = begin + rows.channels - channel;
    const int64_t stop = wrap < end ? wrap : end;
    taylor_range<Function, orders, true>(rows, rows.bias + channel, begin, stop);
    begin = stop;
  }
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void unary_taylor(const TaylorRows<T>& rows, int64_t begin, int64_t end, UnaryFunction function) {
  with_orders(rows.orders, [&](auto number) {
    constexpr int orders = number();
    with_function<VectorMath<T>>(function, [&](auto f) { taylor_biased<decltype(f), orders>(rows, begin, end); });
  });
}
template void unary_taylor(const TaylorRows<float>&, int64_t, int64_t, UnaryFunction);
template void unary_taylor(const TaylorRows<double>&, int64_t, int64_t, UnaryFunction);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
