// Square blocks of vectors transposed in registers, and rows cut into vectors. Included as vector.h is.
#pragma once

#include "constant.h"
#include "cpu/vector.h"

namespace asvit_fast {
namespace {

// One of the log2(lanes) steps of a transposition: rows `stride` apart exchange a quarter of what they hold.
template <typename T, int stride, int... lane>
inline void exchange(Vector<T>& a, Vector<T>& b, Integers<lane...>) {
  const Vector<T> low = __builtin_shufflevector(a, b, (lane & stride ? kLanes<T> + lane - stride : lane)...);
  b = __builtin_shufflevector(a, b, (lane & stride ? kLanes<T> + lane : lane + stride)...);
  a = low;
}

// rows[i][j] becomes rows[j][i].
template <typename T, int stride = 1>
inline void transpose(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (stride < kLanes<T>) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<T>; ++row)
      if (!(row & stride))
        exchange<T, stride>(rows[row], rows[row + stride], typename FirstIntegers<kLanes<T>>::Type());
    transpose<T, stride * 2>(rows);
  }
}

// A square block of so many rows and columns as a vector has lanes, from rows `from_row` apart to rows `to_row` apart.
template <typename T>
inline void transpose_block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  Vector<T> block[kLanes<T>];
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) block[lane] = load<T>(from + lane * from_row);
  transpose<T>(block);
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) store<T>(to + lane * to_row, block[lane]);
}

// Calls run(begin, width) for widths that cover `size` elements from the front: a vector of them, 8, 4, then single
// ones.
template <typename T, typename Run>
inline void for_each_width(int64_t size, Run run) {
  int64_t begin = 0;
  const auto all = [&](auto width) {
    for (; size - begin >= width(); begin += width()) run(begin, width);
  };
  all(Constant<kLanes<T>>());
  if constexpr (kLanes<T> > 8) all(Constant<8>());
  if constexpr (kLanes<T> > 4) all(Constant<4>());
  all(Constant<1>());
}

}  // namespace
}  // namespace asvit_fast
