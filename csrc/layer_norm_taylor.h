// Taylor rule of LayerNorm: pushes (x, x', x'') through y = (x - <x>) / sqrt(<(x - <x>)^2> + eps) weight + bias, <> the
// mean of a row. One declaration per device; no torch header needed.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"
#include "scalar_type.h"
#include "taylor_matrix.h"

namespace asvit_fast {

// CPU: the rows begin <= n < end. weight, bias: [size] or null for none.
ASVIT_FAST_FOR_EACH_ISA(layer_norm_taylor, const TaylorMatrix<T>& matrix, const T* weight, const T* bias, double eps,
                        int64_t begin, int64_t end)

// CUDA: launches on `stream` (a cudaStream_t) and returns. Matrices of `type`; weight, bias: double for float64, else
// float.
void layer_norm_taylor_cuda(const TaylorMatrix<void>& matrix, const void* weight, const void* bias, double eps,
                            ScalarType type, void* stream);

}  // namespace asvit_fast
