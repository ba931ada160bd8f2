// Taylor rule of softmax along rows: pushes (s, s', s'') through p = softmax(s). One declaration per device; no torch
// header needed.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"
#include "scalar_type.h"
#include "taylor_matrix.h"

namespace asvit_fast {

// CPU: the rows begin <= n < end.
ASVIT_FAST_FOR_EACH_ISA(softmax_taylor, const TaylorMatrix<T>& matrix, int64_t begin, int64_t end)

// CUDA: launches on `stream` (a cudaStream_t) and returns.
void softmax_taylor_cuda(const TaylorMatrix<void>& matrix, ScalarType type, void* stream);

}  // namespace asvit_fast
