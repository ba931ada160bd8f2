// Taylor rule of an elementwise function f, for rows (x, x', x''):
//   y = f(x),  y' = f'(x) x',  y'' = f'(x) x'' + f''(x) x'^2      (derivatives with respect to t, not divided by
//   factorials)
//
// See vector.h for who may include this.
#pragma once

#include "constant.h"
#include "cpu/vector.h"
#include "unary_functions.h"
#include "unary_taylor.h"

namespace asvit_fast {
namespace {

// exp(x^2 / 2) Phi(-x) = t q(t), t = 4 / (4 + x), x >= 0: q interpolated at Chebyshev points of t for 0 <= x <= 40,
// relative error 3.4e-8 (float) and 3e-16 (double).
constexpr float kTailFloat[] = {0.0997355431f, 0.0997384042f,  0.0934285074f, 0.0819282383f,  0.0574638732f,
                                0.0678251237f, -0.0385197066f, 0.10225004f,   -0.0844276547f, 0.0205776338f};
constexpr double kTailDouble[] = {
    0.099735570099484222,  0.09973557017136736,  0.093502094295710728,  0.081035212786894656,   0.06350250883223342,
    0.043256570960025637,  0.023292023758995979, 0.007955566130903537,  -0.0074876966285773346, 0.013999675405477556,
    -0.083601901401478343, 0.24580836754019711,  -0.6343508220459636,   1.3579944628786513,     -2.3616132449503602,
    3.3496644962023683,    -3.8210836317657542,  3.4312102890852043,    -2.3758309002305618,    1.2399265454773847,
    -0.47193497191202621,  0.12383299025019227,  -0.020064528231825616, 0.0015157532914562785};

// The arithmetic of unary_functions.h.
template <typename T>
struct VectorMath {
  using Scalar = T;
  using Value = Vector<T>;
  static inline Value broadcast(T x) { return asvit_fast::broadcast<T>(x); }
  static inline Value absolute(Value x) { return asvit_fast::absolute<T>(x); }
  static inline Value clamp(Value x, T low, T high) { return asvit_fast::clamp<T>(x, low, high); }
  static inline Exponential<T> exponential(Value x) { return exponential_negative<T>(x); }

  // Phi(-x) for x >= 0, given bell = exp(-x^2 / 2).
  static inline Value normal_tail(Value x, Value bell) {
    const Value t = T(4) / (T(4) + x);
    if constexpr (sizeof(T) == sizeof(float)) {
      return bell * t * polynomial(kTailFloat, t);
    } else {
      return bell * t * polynomial(kTailDouble, t);
    }
  }
};

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
