// Rows that fill a part of a vector only, several of them in one. Included as vector.h is.
#pragma once

#include "constant.h"
#include "cpu/small_matmul.h"

namespace asvit_fast {
namespace {

// Calls run(Constant<count>()) with how many rows of `size` numbers share a vector: 4, 2, or 1.
template <typename T, typename Run>
inline void with_rows_in_vector(int64_t size, Run run) {
  constexpr int lanes = kLanes<T>, fits = 16 / static_cast<int>(sizeof(T));  // as many neighbours are read at once
  if constexpr (fits >= 4 && lanes >= 4)
    if (4 * size <= lanes) return run(Constant<4>());
  if (2 * size <= lanes) return run(Constant<2>());
  run(Constant<1>());
}

// [a0 b0 a1 b1 ...], of the first halves.
template <typename T, int... lane>
inline Vector<T> interleaved(Vector<T> a, Vector<T> b, Integers<lane...>) {
  return __builtin_shufflevector(a, b, (lane % 2 ? kLanes<T> + lane / 2 : lane / 2)...);
}

// Lanes [column][count] = row(i)[column] for i < count.
template <int count, typename T, typename Row>
inline Vector<T> side_by_side(Row row) {
  if constexpr (count == 1) {
    return row(0);
  } else {
    return interleaved<T>(side_by_side<count / 2, T>([&](int i) { return row(2 * i); }),
                          side_by_side<count / 2, T>([&](int i) { return row(2 * i + 1); }),
                          typename FirstIntegers<kLanes<T>>::Type());
  }
}

// Rows [row][size], read in vectors, to vectors [rows / count][column][count]; zeros for missing rows.
template <int count, typename T>
void pack_side_by_side(const T* rows, int64_t row_count, int64_t size, T* to) {
  for (int64_t i = 0; i < row_count; i += count, to += kLanes<T>)
    store<T>(to, side_by_side<count, T>(
                     [&](int j) { return i + j < row_count ? load<T>(rows + (i + j) * size) : Vector<T>{}; }));
}

// Lane j of the result is lane j * count + part of x.
template <int count, int part, typename T, int... lane>
inline Vector<T> part_of(Vector<T> x, Integers<lane...>) {
  return __builtin_shufflevector(x, x, ((lane * count + part) % kLanes<T>)...);
}

// Lanes [column][count] to their sums [column].
template <int count, typename T>
inline Vector<T> sum_side_by_side(Vector<T> x) {
  using Lanes = typename FirstIntegers<kLanes<T>>::Type;
  if constexpr (count == 1) {
    return x;
  } else {
    return sum_side_by_side<count / 2, T>(part_of<2, 0, T>(x, Lanes()) + part_of<2, 1, T>(x, Lanes()));
  }
}

template <int count, typename T>
void sum_rows_side_by_side(int64_t rows, int64_t row_size, T* sums) {
  for (int64_t i = 0; count > 1 && i < rows; ++i, sums += row_size)
    store<T>(sums, sum_side_by_side<count, T>(load<T>(sums)));
}

}  // namespace
}  // namespace asvit_fast
