// Walking along rows of any length in full vectors, for ops that reduce along a row of (x, x', x''). See vector.h for
// who may include this.
#pragma once

#include "constant.h"
#include "cpu/vector.h"
#include "taylor_matrix.h"

namespace asvit_fast {
namespace {

// Which lanes of a vector count: all of them ...
template <typename T>
struct AllLanes {
  inline Vector<T> only(Vector<T> x, T = T(0)) const { return x; }
  inline void store_to(T* to, Vector<T> x) const { store<T>(to, x); }
};

// ... or, where a row ends, those that the vector before has not had.
template <typename T>
struct SomeLanes {
  typename VectorOf<T>::Bits mask;
  inline Vector<T> only(Vector<T> x, T other = T(0)) const { return mask ? x : broadcast<T>(other); }
  inline void store_to(T* to, Vector<T> x) const { store<T>(to, mask ? x : load<T>(to)); }
};

// Calls body(i, lanes) for the vectors that cover 0 <= i < size. The last one overlaps the one before, so that it ends
// where the row ends; a row shorter than a vector must have room for a whole one.
template <typename T, typename Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) body(i, AllLanes<T>{});
  if (i == size) return;
  const int64_t start = size < kLanes<T> ? 0 : size - kLanes<T>;
  typename VectorOf<T>::Bits mask;
  for (int lane = 0; lane < kLanes<T>; ++lane) mask[lane] = start + lane >= i && start + lane < size ? -1 : 0;
  body(start, SomeLanes<T>{mask});
}

// One row of every order.
template <typename T>
struct TaylorRow {
  const T* input;  // order k begins at k * input_stride
  int64_t input_stride;
  T* output;
  int64_t output_stride;
  int64_t size;

  inline Vector<T> load_from(int order, int64_t i) const { return load<T>(input + order * input_stride + i); }
  inline T* out(int order, int64_t i) const { return output + order * output_stride + i; }
};

// Calls body(row) for the rows begin <= n < end. Rows shorter than a vector go through memory that has room for one.
template <int orders, typename T, typename Body>
inline void for_each_row(const TaylorMatrix<T>& matrix, int64_t begin, int64_t end, Body body) {
  const int64_t size = matrix.size, stride = matrix.count * size;
  if (size >= kLanes<T>) {
    for (int64_t n = begin; n < end; ++n)
      body(TaylorRow<T>{matrix.input + n * size, stride, matrix.output + n * size, stride, size});
    return;
  }
  constexpr int lanes = kLanes<T>;
  T input[(orders + 1) * lanes] = {}, output[(orders + 1) * lanes] = {};
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);
  for (int64_t n = begin; n < end; ++n) {
    for (int order = 0; order <= orders; ++order)
      std::memcpy(input + order * lanes, matrix.input + order * stride + n * size, bytes);
    body(TaylorRow<T>{input, lanes, output, lanes, size});
    for (int order = 0; order <= orders; ++order)
      std::memcpy(matrix.output + order * stride + n * size, output + order * lanes, bytes);
  }
}

}  // namespace
}  // namespace asvit_fast
