// Threads that share a row: how they are chosen and how they add up.
#pragma once

#include "cuda/numbers.h"
#include "taylor_matrix.h"

namespace asvit_fast {
namespace {

constexpr int kBlock = 256;  // threads
constexpr int kWarp = 32;

// `size` threads of a block: a power of two up to a warp, or the whole block. All of a block's teams have one size.
struct Team {
  int size;

  __device__ inline int rank() const { return threadIdx.x & (size - 1); }

  // The row of this thread's team; teams without one take part in the sums with the last row.
  __device__ inline int64_t row() const {
    return static_cast<int64_t>(blockIdx.x) * (kBlock / size) + threadIdx.x / size;
  }

  // Joins one value of each thread; all get the result, always added up in the same order.
  template <typename C, typename Operation>
  __device__ inline C reduce(C value, Operation join) const {
    const int within = size < kWarp ? size : kWarp;
    for (int offset = within / 2; offset > 0; offset /= 2)
      value = join(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (size <= kWarp) return value;
    __shared__ C partial[kBlock / kWarp];
    __syncthreads();  // the sum before has been read
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
    for (int warp = 1; warp < kBlock / kWarp; ++warp) value = join(value, partial[warp]);
    return value;
  }

  template <typename C>
  __device__ inline C sum(C value) const {
    return reduce(value, [](C a, C b) { return a + b; });
  }

  // NaN is passed over.
  template <typename C>
  __device__ inline C largest(C value) const {
    return reduce(value, [](C a, C b) { return a > b ? a : b; });
  }
};

// As many threads as a row has vectors; a whole block where a warp would loop more than 8 times.
inline Team team_for(int64_t size, int width) {
  const int64_t vectors = (size + width - 1) / width;
  if (vectors > 8 * kWarp) return {kBlock};
  int threads = 1;
  while (threads < vectors && threads < kWarp) threads *= 2;
  return {threads};
}

inline unsigned blocks_for(int64_t rows, Team team) {
  const int64_t per_block = kBlock / team.size;
  return static_cast<unsigned>((rows + per_block - 1) / per_block);  // grid.x: up to 2^31 - 1
}

// Rows start on a vector boundary only if their length is a whole number of vectors.
template <typename T>
bool in_vectors(const TaylorMatrix<void>& matrix) {
  return aligned(matrix.input, matrix.output) && matrix.size % (kVectorBytes / sizeof(T)) == 0;
}

}  // namespace
}  // namespace asvit_fast
