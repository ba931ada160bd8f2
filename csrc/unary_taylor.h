// Taylor rules of elementwise functions: pushes (x, x', x'') through y = f(x + bias). One declaration per device; no
// torch header needed.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"
#include "scalar_type.h"

namespace asvit_fast {

// What f may be; unary_functions.h has the formulas.
enum class UnaryFunction { gelu, gelu_tanh, tanh, square };

// A stack of `orders` + 1 contiguous rows of `count` values each: the value, then its derivatives with respect to t.
template <typename T>
struct TaylorRows {
  const T* input;  // [orders + 1, count]
  T* output;       // [orders + 1, count]
  int64_t count;
  int orders;        // 0, 1 or 2
  const T* bias;     // [channels], added to the value of column i at i % channels; null for none
  int64_t channels;  // at least 1
};

// CPU: the columns begin <= i < end of the rows.
ASVIT_FAST_FOR_EACH_ISA(unary_taylor, const TaylorRows<T>& rows, int64_t begin, int64_t end, UnaryFunction function)

// CUDA: launches on `stream` (a cudaStream_t) and returns. Rows of `type`, the bias double for float64, else float.
void unary_taylor_cuda(const TaylorRows<void>& rows, UnaryFunction function, ScalarType type, void* stream);

}  // namespace asvit_fast
