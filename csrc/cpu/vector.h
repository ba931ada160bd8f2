// Vectors of the width that the including file was compiled for (GNU vector extensions: GCC and Clang), and their
// maths.
//
// Include it only from a file that compiles for one instruction set, after that set has been switched on: everything
// here is in an anonymous namespace, so that no copy made for AVX-512 can be linked into code that runs elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace asvit_fast {
namespace {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
  static constexpr float kExpMin = -87.3f;                // below, exp() is not a normal number: 0 is returned
  static constexpr float kRound = 12582912.f;             // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2High = 0.693145751953125f;  // ln 2 in two parts, the first with few bits
  static constexpr float kLog2Low = 1.42860682030941723e-6f;
  static constexpr int32_t kMagnitude = 0x7fffffff;  // all bits but the sign
  static constexpr int kMantissa = 23;
  static constexpr int kBias = 127;
  static constexpr int kExpTerms = 7;
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
  static constexpr double kExpMin = -708.3;
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLog2High = 6.93147180369123816490e-01;
  static constexpr double kLog2Low = 1.90821492927058770002e-10;
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff;
  static constexpr int kMantissa = 52;
  static constexpr int kBias = 1023;
  static constexpr int kExpTerms = 13;
};

template <typename T>
using Vector = typename VectorOf<T>::Type;
template <typename T>
constexpr int kLanes = ASVIT_FAST_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
inline void store(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof x);
}

template <typename T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // x - 0 is x, also of -0: no addition is left of it, as it would be of 0 + x
}

// Keeps NaN.
template <typename T>
inline Vector<T> clamp(Vector<T> x, T low, T high) {
  x = x < low ? broadcast<T>(low) : x;
  return x > high ? broadcast<T>(high) : x;
}

template <typename T>
inline Vector<T> absolute(Vector<T> x) {
  typename VectorOf<T>::Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= VectorOf<T>::kMagnitude;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// c[0] + c[1] x + ... (Horner; the loop is unrolled)
template <typename T, int N>
inline Vector<T> polynomial(const T (&c)[N], Vector<T> x) {
  Vector<T> sum = broadcast<T>(c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// exp(x), and exp(x) - 1 to full relative accuracy.
template <typename T>
struct Exponential {
  Vector<T> value, minus_one;
};

// For x <= 0: x = n ln 2 + r with |r| <= ln 2 / 2, then the series of exp(r) - 1, scaled by 2^n through the exponent
// bits.
template <typename T>
inline Exponential<T> exponential_negative(Vector<T> x) {
  using V = VectorOf<T>;
  constexpr T inverse_factorials[] = {T(1.0),
                                      T(1.0),
                                      T(1.0 / 2),
                                      T(1.0 / 6),
                                      T(1.0 / 24),
                                      T(1.0 / 120),
                                      T(1.0 / 720),
                                      T(1.0 / 5040),
                                      T(1.0 / 40320),
                                      T(1.0 / 362880),
                                      T(1.0 / 3628800),
                                      T(1.0 / 39916800),
                                      T(1.0 / 479001600),
                                      T(1.0 / 6227020800)};
  const Vector<T> shifted = x * T(1.4426950408889634) + V::kRound;
  const Vector<T> n = shifted - V::kRound;
  const Vector<T> r = (x - n * V::kLog2High) - n * V::kLog2Low;
  Vector<T> series = broadcast<T>(inverse_factorials[V::kExpTerms]);
#pragma GCC unroll 16
  for (int i = V::kExpTerms - 1; i >= 1; --i) series = series * r + inverse_factorials[i];
  typename V::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + V::kBias) << V::kMantissa;  // the low bits of `shifted` are n
  Vector<T> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const Vector<T> rest = series * r * scale;
  return {x < V::kExpMin ? Vector<T>{} : scale + rest, x < V::kExpMin ? broadcast<T>(T(-1)) : (scale - T(1)) + rest};
}

// exp(x) for x <= 0.
template <typename T>
inline Vector<T> exp_negative(Vector<T> x) {
  return exponential_negative<T>(x).value;
}

template <typename T, int bytes>
struct Part {
  typedef T Type __attribute__((vector_size(bytes)));
};

// All lanes joined by an associative operation (on vectors and on numbers): halves with halves, always in this order.
template <typename T, int bytes = ASVIT_FAST_VECTOR_BYTES, typename Operation>
inline T reduce(typename Part<T, bytes>::Type x, Operation join) {
  if constexpr (bytes > 16) {
    typename Part<T, bytes / 2>::Type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return reduce<T, bytes / 2>(join(halves[0], halves[1]), join);
  } else if constexpr (sizeof(T) == 4) {
    return join(join(x[0], x[2]), join(x[1], x[3]));
  } else {
    return join(x[0], x[1]);
  }
}

template <typename T>
inline T total(Vector<T> x) {
  return reduce<T>(x, [](auto a, auto b) { return a + b; });
}

template <typename T>
inline T largest(Vector<T> x) {
  return reduce<T>(x, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace asvit_fast
