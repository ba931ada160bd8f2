// Elementwise functions with two derivatives, for CPU vectors and for CUDA. To add one: a type with
// `static Derivatives<Value> at(Value x)` here, its name in unary_taylor.h's UnaryFunction, and a case below.
//
// `Math` has Scalar (float or double), Value (a number or a vector of them) and the functions used here; the CPU's is
// in cpu/unary_taylor_kernel.h, which says who may include this, CUDA's in cuda/unary_taylor.cu.
#pragma once

#include "unary_taylor.h"

#ifdef __CUDACC__
#define ASVIT_FAST_DEVICE __device__
#else
#define ASVIT_FAST_DEVICE
#endif

namespace asvit_fast {
namespace {

template <typename Value>
struct Derivatives {
  Value value, first, second;
};

// GELU(x) = x P(x), where P is the normal distribution function Phi, or for the tanh approximation the logistic
// function of u(x) = 2 sqrt(2 / pi) (x + 0.044715 x^3). A gate gives P, P', P'' for |x| <= 40; both need one exp.
template <typename Math>
struct NormalGate {
  using T = typename Math::Scalar;
  using Value = typename Math::Value;
  static ASVIT_FAST_DEVICE inline Derivatives<Value> at(Value x) {
    const Value bell = Math::exponential(x * x * T(-0.5)).value;
    const Value tail = Math::normal_tail(Math::absolute(x), bell);  // Phi(-|x|), without cancellation
    const Value density = bell * T(0.39894228040143268);            // 1 / sqrt(2 pi)
    return {x < T(0) ? tail : T(1) - tail, density, -x * density};
  }
};

template <typename Math>
struct LogisticGate {
  using T = typename Math::Scalar;
  using Value = typename Math::Value;
  static ASVIT_FAST_DEVICE inline Derivatives<Value> at(Value x) {
    constexpr T slope = T(1.5957691216057308), cubic = T(0.044715);  // 2 sqrt(2 / pi)
    const Value square = x * x;
    const Value u = slope * x * (T(1) + cubic * square);
    const Value u1 = slope * (T(1) + T(3) * cubic * square);  // du/dx
    const Value u2 = T(6) * slope * cubic * x;                // d2u/dx2
    const Value e = Math::exponential(-Math::absolute(u)).value;
    const Value inverse = T(1) / (T(1) + e);
    const Value small = e * inverse;        // logistic(-|u|)
    const Value product = small * inverse;  // P (1 - P)
    const Value balance = (inverse - small) * (u < T(0) ? Math::broadcast(T(1)) : Math::broadcast(T(-1)));  // 1 - 2 P
    return {u < T(0) ? small : inverse, product * u1, product * (balance * u1 * u1 + u2)};
  }
};

template <typename Math, typename Gate>
struct Gelu {
  using T = typename Math::Scalar;
  using Value = typename Math::Value;
  static ASVIT_FAST_DEVICE inline Derivatives<Value> at(Value x) {
    // beyond, P is 0 or 1 and its derivatives are 0 in both precisions; clamped, they stay so for huge and infinite x
    const Value z = Math::clamp(x, T(-40), T(40));
    const Derivatives<Value> gate = Gate::at(z);
    return {x * gate.value, gate.value + z * gate.first, T(2) * gate.first + z * gate.second};
  }
};

template <typename Math>
struct Tanh {
  using T = typename Math::Scalar;
  using Value = typename Math::Value;
  static ASVIT_FAST_DEVICE inline Derivatives<Value> at(Value x) {
    const auto e = Math::exponential(T(-2) * Math::absolute(x));
    const Value inverse = T(1) / (T(1) + e.value);
    const Value magnitude = -e.minus_one * inverse;  // (1 - e) / (1 + e), exact to the last digits for small x too
    const Value value = x < T(0) ? -magnitude : magnitude;
    const Value first = T(4) * e.value * inverse * inverse;  // 1 - tanh^2, without cancellation
    return {value, first, T(-2) * value * first};
  }
};

template <typename Math>
struct Square {
  using T = typename Math::Scalar;
  using Value = typename Math::Value;
  static ASVIT_FAST_DEVICE inline Derivatives<Value> at(Value x) { return {x * x, T(2) * x, Math::broadcast(T(2))}; }
};

// Calls body(Function{}) with the type of `function`.
template <typename Math, typename Body>
inline void with_function(UnaryFunction function, Body body) {
  switch (function) {
    case UnaryFunction::gelu:
      return body(Gelu<Math, NormalGate<Math>>{});
    case UnaryFunction::gelu_tanh:
      return body(Gelu<Math, LogisticGate<Math>>{});
    case UnaryFunction::tanh:
      return body(Tanh<Math>{});
    case UnaryFunction::square:
      return body(Square<Math>{});
  }
}

}  // namespace
}  // namespace asvit_fast
