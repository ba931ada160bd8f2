// The arithmetic of unary_functions.h on vectors. Included as vector.h is.
#pragma once

#include "cpu/vector.h"
#include "unary_functions.h"

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

// 1 / x, with AVX-512 by an estimate (14 bits) and a Newton step: a division keeps a multiplier for as long as nine
// products.
inline Vector<double> reciprocal(Vector<double> x) { return 1. / x; }

inline Vector<float> reciprocal(Vector<float> x) {
#if defined(__x86_64__) && ASVIT_FAST_VECTOR_BYTES == 64
  const Vector<float> estimate = _mm512_rcp14_ps(x);
  return estimate * (2.f - x * estimate);
#else
  return 1.f / x;
#endif
}

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
    const Value t = T(4) * reciprocal(T(4) + (x > T(64) ? asvit_fast::broadcast<T>(T(64)) : x));  // not of infinity
    if constexpr (sizeof(T) == sizeof(float)) {
      return bell * t * polynomial(kTailFloat, t);
    } else {
      return bell * t * polynomial(kTailDouble, t);
    }
  }
};

}  // namespace
}  // namespace asvit_fast
