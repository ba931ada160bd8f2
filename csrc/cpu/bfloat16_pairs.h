// Neighbouring bfloat16 numbers of a sum as operands of the instruction that multiplies and adds both. Included as
// vector.h is.
#pragma once

#include "cpu/half_precision.h"

namespace asvit_fast {
namespace {

// The first number in the lower half.
enum class Pair : int32_t {};

template <>
struct VectorOf<Pair> {
  typedef int32_t Type __attribute__((vector_size(ASVIT_FAST_VECTOR_BYTES)));
};

template <typename Operand>
constexpr bool is_pair = false;
template <>
constexpr bool is_pair<Pair> = true;

// How many operands `size` numbers of a sum are.
template <typename Operand>
constexpr int64_t operand_count(int64_t size) {
  return size;
}
template <>
constexpr int64_t operand_count<Pair>(int64_t size) {
  return (size + 1) / 2;
}

template <>
inline Vector<Pair> broadcast<Pair>(Pair x) {
  return static_cast<int32_t>(x) - Vector<Pair>{};
}

#if ASVIT_FAST_BF16_DOT
constexpr bool kHasPairs = true;

inline void add_product(Vector<float>& sum, Vector<Pair> a, Vector<Pair> b) {
  __m512bh pairs[2];
  std::memcpy(&pairs[0], &a, sizeof a);
  std::memcpy(&pairs[1], &b, sizeof b);
  sum = _mm512_dpbf16_ps(sum, pairs[0], pairs[1]);
}
#else
constexpr bool kHasPairs = false;
#endif

// Rows [i][j] and [i + 1][j] of a sum over i, in vectors.
inline Vector<Pair> interleave(UnsignedBits first, UnsignedBits second) {
  const UnsignedBits pairs = first | second << 16;
  Vector<Pair> result;
  std::memcpy(&result, &pairs, sizeof pairs);
  return result;
}

// The same of numbers that are to be rounded, and neither infinite nor close to it.
inline Vector<Pair> round_and_interleave(Vector<float> first, Vector<float> second) {
  UnsignedBits bits[2];
  std::memcpy(&bits[0], &first, sizeof first);
  std::memcpy(&bits[1], &second, sizeof second);
  const UnsignedBits pairs = (bits[0] + 0x8000) >> 16 | ((bits[1] + 0x8000) & 0xffff0000);
  Vector<Pair> result;
  std::memcpy(&result, &pairs, sizeof pairs);
  return result;
}

}  // namespace
}  // namespace asvit_fast
