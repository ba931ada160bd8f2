// Products of small matrices that lie in the first levels of the cache. Included as vector.h is.
//
// A register block is `rows` numbers of the left matrix, each broadcast from memory, times `vectors` vectors of the
// right one: enough independent sums to keep both multipliers busy, few enough for the registers.
#pragma once

#include "constant.h"
#include "cpu/bfloat16_pairs.h"

namespace asvit_fast {
namespace {

// Neighbours along k as one operand, for right matrices so narrow that a vector has room for as many of their rows,
// [column][count]. The sums [column][count] remain to be added (narrow_rows.h).
template <typename T, int count>
struct Neighbours {
  T numbers[count];
};

template <typename T, int count>
struct VectorOf<Neighbours<T, count>> : VectorOf<T> {};

template <typename Operand>
inline Vector<Operand> in_all_lanes(Operand x) {
  return broadcast<Operand>(x);
}

// Neighbours are 8 or 16 bytes, which the processor repeats as it reads them.
template <typename T, int count>
inline Vector<T> in_all_lanes(Neighbours<T, count> x) {
  Vector<T> result;
  if constexpr (sizeof x == sizeof(int64_t)) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const VectorOf<double>::Bits all = bits - VectorOf<double>::Bits{};
    std::memcpy(&result, &all, sizeof all);
  } else {
#if ASVIT_FAST_VECTOR_BYTES == 64
    __m128 bits;
    std::memcpy(&bits, &x, sizeof bits);
    const __m512 all = _mm512_broadcast_f32x4(bits);
    std::memcpy(&result, &all, sizeof all);
#else
    for (int i = 0; i < kLanes<T>; ++i) result[i] = x.numbers[i % count];
#endif
  }
  return result;
}

// to[i][j] = base[i][j] + factor * sum over k of left[i * left_row + k * left_step] * right[k][j]. Operands are numbers
// of type T, pairs of bfloat16 numbers that lie side by side along k, or neighbours; what is written may be rounded.
template <typename T, typename Operand = T, typename Number = T>
struct Product {
  const Operand* left;
  int64_t left_row, left_step;
  const Operand* right;
  int64_t right_row;
  const T* base;  // null: zeros
  int64_t base_row;
  Number* to;
  int64_t to_row;
  T factor = T(1);
};

inline void add_product(Vector<float>& sum, Vector<float> a, Vector<float> b) { sum += a * b; }
inline void add_product(Vector<double>& sum, Vector<double> a, Vector<double> b) { sum += a * b; }

constexpr bool kWideRegisters = ASVIT_FAST_VECTOR_BYTES == 64;  // 32 of them

constexpr int kMostVectors = kWideRegisters ? 4 : 2;  // of a strip

constexpr int most_rows(int vectors) {
  return kWideRegisters ? (vectors == 4 ? 6 : 8) : vectors == 1 ? 8 : vectors == 2 ? 6 : 4;
}

// The sum is added to the base at its end: rounding errors grow with the length of a sum.
template <int vectors, int rows, typename T, typename Operand, typename Number>
inline void multiply_block(const Product<T, Operand, Number>& p, int64_t i, int64_t j, int64_t depth) {
  Vector<T> sum[rows][vectors] = {};
  const int64_t left_row = p.left_row, left_step = p.left_step, right_row = p.right_row;
  const Operand* left = p.left + i * left_row;
  const Operand* right = p.right + j;
  for (int64_t k = 0; k < depth; ++k) {
    Vector<Operand> b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = load<Operand>(right + v * kLanes<T>);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      Operand number;  // copied, as pairs may begin anywhere
      std::memcpy(&number, left + row * left_row, sizeof number);
      const Vector<Operand> a = in_all_lanes(number);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) add_product(sum[row][v], a, b[v]);
    }
    left += left_step;
    right += right_row;
  }
  const int64_t base_row = p.base_row, to_row = p.to_row;  // here: what is written might be the product itself
  Number* to = p.to + i * to_row + j;
  const T factor = p.factor;
  if (p.base) {
    const T* base = p.base + i * base_row + j;
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v)
        store_rounded(to + row * to_row + v * kLanes<T>,
                      factor * sum[row][v] + load<T>(base + row * base_row + v * kLanes<T>));
    return;
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store_rounded(to + row * to_row + v * kLanes<T>, factor * sum[row][v]);
}

template <int vectors, int rows = most_rows(vectors), typename T, typename Operand, typename Number>
inline void multiply_rows(const Product<T, Operand, Number>& p, int64_t i, int64_t count, int64_t j, int64_t depth) {
  if (count == rows) {
    multiply_block<vectors, rows>(p, i, j, depth);
  } else if constexpr (rows > 1) {
    multiply_rows<vectors, rows - 1>(p, i, count, j, depth);
  }
}

// One strip of columns; the rows are cut into blocks of nearly one size.
template <int vectors, typename T, typename Operand, typename Number>
void multiply_strip(const Product<T, Operand, Number>& p, int64_t rows, int64_t j, int64_t depth) {
  const auto count = static_cast<uint32_t>(rows);
  const uint32_t blocks = (count + most_rows(vectors) - 1) / most_rows(vectors);
  const uint32_t size = count / blocks, larger = count % blocks;
  int64_t i = 0;
  for (uint32_t block = 0; block < blocks; ++block) {
    const int64_t block_rows = size + (block < larger ? 1 : 0);
    multiply_rows<vectors>(p, i, block_rows, j, depth);
    i += block_rows;
  }
}

// `columns` of the right matrix are read and written in whole vectors.
template <typename T, typename Operand = T>
void multiply(const Product<T, Operand>& p, int64_t rows, int64_t columns, int64_t depth) {
  int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  for (int64_t j = 0; vectors > 0;) {
    const int64_t strip = vectors == 1 || vectors == 3 ? vectors : 2;
    if (strip == 1) multiply_strip<1>(p, rows, j, depth);
    if (strip == 2) multiply_strip<2>(p, rows, j, depth);
    if (strip == 3) multiply_strip<3>(p, rows, j, depth);
    vectors -= strip;
    j += strip * kLanes<T>;
  }
}

// The same with as few and wide strips as there are registers for; columns from j on, in whole vectors.
template <int most = kMostVectors, typename T, typename Operand, typename Number>
inline void multiply_vectors(const Product<T, Operand, Number>& p, int64_t rows, int64_t vectors, int64_t depth,
                             int64_t j = 0) {
  if (vectors == most) {
    multiply_strip<most>(p, rows, j, depth);
  } else if constexpr (most > 1) {
    multiply_vectors<most - 1>(p, rows, vectors, depth, j);
  }
}

template <typename T>
void multiply_wide(const Product<T>& p, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += kMostVectors * kLanes<T>) {
    const int64_t vectors = (columns - j) / kLanes<T>;
    multiply_vectors(p, rows, vectors < kMostVectors ? vectors : kMostVectors, depth, j);
  }
}

}  // namespace
}  // namespace asvit_fast
