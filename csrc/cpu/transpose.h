// Square blocks of vectors turned around in registers. Included as vector.h is, after <utility>.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/vector.h"

namespace asvit_fast {
namespace {

// One of the log2(lanes) steps of a transposition: rows `stride` apart exchange a quarter of what they hold.
template <typename T, int stride, int... lane>
inline void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, lane...>) {
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
        exchange<T, stride>(rows[row], rows[row + stride], std::make_integer_sequence<int, kLanes<T>>());
    transpose<T, stride * 2>(rows);
  }
}

}  // namespace
}  // namespace asvit_fast
