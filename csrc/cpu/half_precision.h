// Numbers of one type as those of another. Included as vector.h is.
#pragma once

#include "cpu/transpose.h"
#include "cpu/vector.h"

namespace asvit_fast {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Without a branch, for which compilers would take floating point out of vectors.
inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0 - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;  // of a float's bits
constexpr uint32_t kExponents = 112u << 23;                          // by which the biases of float and float16 differ

// The number is of type Out, and so is what is returned.
template <typename Out, typename In>
inline Out convert(In x, Out) {
  return static_cast<Out>(x);
}

template <typename Out>
inline Out convert(BFloat16 x, Out) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}

template <typename In>
inline BFloat16 convert(In x, BFloat16) {
  const uint32_t bits = bits_of(static_cast<float>(x));
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>((bits & kMagnitude) > kInfinity ? 0x7fc0 : rounded)};
}

template <typename Out>
inline Out convert(Float16 x, Out) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + kExponents + (magnitude >= 0x7c00 ? kExponents : 0);  // or infinite, NaN
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | choose(magnitude < 0x400, subnormal, normal));
}

template <typename In>
inline Float16 convert(In x, Float16) {
  const uint32_t bits = bits_of(static_cast<float>(x)), magnitude = bits & kMagnitude;
  const uint32_t normal = (magnitude - kExponents + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // whose last bit counts 2^-24
  uint32_t half = choose(magnitude < bits_of(0x1p-14f), subnormal, normal);
  half = choose(magnitude >= bits_of(65520.f), 0x7c00, half);
  half = choose(magnitude > kInfinity, 0x7e00, half);
  return {static_cast<uint16_t>((bits >> 16 & 0x8000) | half)};
}

// ------------------------------------------------------------------------------------------------------------ vectors

typedef uint32_t UnsignedBits __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES / 2)));

inline UnsignedBits load_bits(const BFloat16* from) {
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, UnsignedBits);
}

inline Vector<float> load_wide(const float* from) { return load<float>(from); }

inline Vector<float> load_wide(const BFloat16* from) {
  const UnsignedBits bits = load_bits(from) << 16;
  Vector<float> x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void store_rounded(float* to, Vector<float> x) { store<float>(to, x); }
inline void store_rounded(double* to, Vector<double> x) { store<double>(to, x); }

inline HalfBits round_vector(Vector<float> x) {
  UnsignedBits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const UnsignedBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector((bits & kMagnitude) > kInfinity ? UnsignedBits{} + 0x7fc0 : rounded, HalfBits);
}

// Where the processor rounds by itself, numbers below the normal ones become 0, as they do in its products.
inline void store_rounded(BFloat16* to, Vector<float> x) {
#if ASVIT_FAST_BF16_DOT
  const __m256bh halves = _mm512_cvtneps_pbh(x);
#else
  const HalfBits halves = round_vector(x);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// How many of the numbers were converted in whole vectors.
template <typename In, typename Out>
inline int64_t convert_vectors(const In*, int64_t, Out*) {
  return 0;
}

inline int64_t convert_vectors(const BFloat16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) store<float>(to + i, load_wide(from + i));
  return i;
}

inline int64_t convert_vectors(const float* from, int64_t count, BFloat16* to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    const HalfBits halves = round_vector(load<float>(from + i));
    std::memcpy(to + i, &halves, sizeof halves);
  }
  return i;
}

#if defined(__x86_64__) && ASVIT_FAST_VECTOR_BYTES > 16
typedef short Eight __attribute__((vector_size(16)));
typedef float EightFloats __attribute__((vector_size(32)));

inline int64_t convert_vectors(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    Eight halves;
    std::memcpy(&halves, from + i, sizeof halves);
    const EightFloats floats = __builtin_ia32_vcvtph2ps256(halves);
    std::memcpy(to + i, &floats, sizeof floats);
  }
  return i;
}

inline int64_t convert_vectors(const float* from, int64_t count, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    EightFloats floats;
    std::memcpy(&floats, from + i, sizeof floats);
    const Eight halves = __builtin_ia32_vcvtps2ph256(floats, 0);  // 0: to the nearest, of two to the even one
    std::memcpy(to + i, &halves, sizeof halves);
  }
  return i;
}
#endif

// --------------------------------------------------------------------------------------------------------------- rows

template <typename In, typename Out>
inline void convert_row(const In* from, int64_t size, Out* to) {
  for (int64_t i = convert_vectors(from, size, to); i < size; ++i) to[i] = convert(from[i], Out());
}

template <typename T>
inline void convert_row(const T* from, int64_t size, T* to) {
  for_each_width<T>(size, [&](int64_t i, auto width) { std::memcpy(to + i, from + i, width() * sizeof(T)); });
}

}  // namespace
}  // namespace asvit_fast
