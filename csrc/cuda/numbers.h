// Element types in CUDA kernels: what they are computed in, conversions, loads of neighbours.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "constant.h"
#include "scalar_type.h"

namespace asvit_fast {
namespace {

constexpr int kVectorBytes = 16;  // one load instruction per thread and row

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Spelled out, as torch compiles with the implicit conversions of half types switched off.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(Compute<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// `width` neighbouring values, loaded and stored with one instruction.
template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T values[width];
};

inline bool aligned(const void* input, const void* output) {
  return (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output)) % kVectorBytes == 0;
}

}  // namespace
}  // namespace asvit_fast
