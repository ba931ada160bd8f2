// The instructions of a GPU that are no C++. tests/cuda_on_cpu has these functions for a CPU.
#pragma once

#include <cuda_runtime.h>

namespace asvit_fast {
namespace {

// 2^x with a relative error of at most 2^-22; results below 2^-126 are 0.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x with an error of at most one in the last place; for |x| above 2^126 it is 0.
__device__ inline float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c [16, 8] += a [16, 8] b [8, 8] in TF32 by the 32 threads of a warp. The thread 4 row + column, column < 4, has
//   of a  (row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4),
//   of b  (column, row), (column + 4, row),
//   of c  (row, 2 column), (row, 2 column + 1), (row + 8, 2 column), (row + 8, 2 column + 1).
// The low 13 bits of a and b are not read; products are exact, sums are truncated, not rounded.
__device__ inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace
}  // namespace asvit_fast
