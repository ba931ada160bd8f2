// The Taylor rule of GELU for one instruction set: GELU(x) = x P(x), where P is the normal distribution function Phi,
// or for the tanh approximation the logistic function of 2 u(x), u = sqrt(2 / pi) (x + 0.044715 x^3). Both need one
// exp.
#pragma once

#include "cpu/unary_taylor.h"

namespace asvit_fast {
namespace {

// Beyond, P is 0 or 1 and its derivatives are 0 in both precisions; clamped, they stay so for huge and infinite x.
template <typename T>
constexpr T kSaturation = T(40);

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

template <typename T>
inline Vector<T> tail_polynomial(Vector<T> t) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return polynomial(kTailFloat, t);
  } else {
    return polynomial(kTailDouble, t);
  }
}

// P(x), P'(x), P''(x) as Derivatives.
struct NormalGate {
  template <typename T>
  static inline Derivatives<T> at(Vector<T> x) {
    const Vector<T> bell = exp_negative<T>(x * x * T(-0.5));
    const Vector<T> t = T(4) / (T(4) + absolute<T>(x));
    const Vector<T> tail = bell * t * tail_polynomial<T>(t);  // Phi(-|x|), without cancellation
    const Vector<T> density = bell * T(0.39894228040143268);  // 1 / sqrt(2 pi)
    return {x < T(0) ? tail : T(1) - tail, density, -x * density};
  }
};

struct LogisticGate {
  template <typename T>
  static inline Derivatives<T> at(Vector<T> x) {
    constexpr T slope = T(1.5957691216057308), cubic = T(0.044715);  // 2 sqrt(2 / pi)
    const Vector<T> square = x * x;
    const Vector<T> u = slope * x * (T(1) + cubic * square);      // P = logistic(u)
    const Vector<T> u1 = slope * (T(1) + T(3) * cubic * square);  // du/dx
    const Vector<T> u2 = T(6) * slope * cubic * x;                // d2u/dx2
    const Vector<T> e = exp_negative<T>(-absolute<T>(u));
    const Vector<T> inverse = T(1) / (T(1) + e);
    const Vector<T> small = e * inverse;        // logistic(-|u|)
    const Vector<T> product = small * inverse;  // P (1 - P)
    const Vector<T> balance = (inverse - small) * (u < T(0) ? broadcast<T>(T(1)) : broadcast<T>(T(-1)));  // 1 - 2 P
    return {u < T(0) ? small : inverse, product * u1, product * (balance * u1 * u1 + u2)};
  }
};

template <typename Gate>
struct Gelu {
  template <typename T>
  static inline Derivatives<T> at(Vector<T> x) {
    const Vector<T> z = clamp<T>(x, -kSaturation<T>, kSaturation<T>);
    const Derivatives<T> gate = Gate::template at<T>(z);
    return {x * gate.value, gate.value + z * gate.first, T(2) * gate.first + z * gate.second};
  }
};

template <typename T>
inline void gelu_taylor(const TaylorRows<T>& rows, int64_t begin, int64_t end, bool tanh) {
  if (tanh) {
    unary_taylor<Gelu<LogisticGate>>(rows, begin, end);
  } else {
    unary_taylor<Gelu<NormalGate>>(rows, begin, end);
  }
}

}  // namespace
}  // namespace asvit_fast

// The two entry points, for the namespace of the instruction set.
#define ASVIT_FAST_GELU_TAYLOR_KERNELS                                                          \
  void gelu_taylor_f32(const TaylorRows<float>& rows, int64_t begin, int64_t end, bool tanh) {  \
    gelu_taylor(rows, begin, end, tanh);                                                        \
  }                                                                                             \
  void gelu_taylor_f64(const TaylorRows<double>& rows, int64_t begin, int64_t end, bool tanh) { \
    gelu_taylor(rows, begin, end, tanh);                                                        \
  }
