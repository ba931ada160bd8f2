// Taylor rule of softmax along rows: pushes (s, s', s'') through p = softmax(s). One declaration per device; no torch
// header needed.
#pragma once

#include <cstdint>

#include "scalar_type.h"
#include "taylor_matrix.h"

namespace asvit_fast {

// CPU: processes the rows begin <= n < end. One copy per instruction set.
template <typename T>
using SoftmaxTaylorCpu = void(const TaylorMatrix<T>& matrix, int64_t begin, int64_t end);

namespace portable {
SoftmaxTaylorCpu<float> softmax_taylor_f32;
SoftmaxTaylorCpu<double> softmax_taylor_f64;
}  // namespace portable
namespace avx2 {
SoftmaxTaylorCpu<float> softmax_taylor_f32;
SoftmaxTaylorCpu<double> softmax_taylor_f64;
}  // namespace avx2
namespace avx512 {
SoftmaxTaylorCpu<float> softmax_taylor_f32;
SoftmaxTaylorCpu<double> softmax_taylor_f64;
}  // namespace avx512

// CUDA: launches on `stream` (a cudaStream_t) and returns.
void softmax_taylor_cuda(const TaylorMatrix<void>& matrix, ScalarType type, void* stream);

}  // namespace asvit_fast
