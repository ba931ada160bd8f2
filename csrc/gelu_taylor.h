// Taylor rule of GELU: pushes (x, x', x'') through y = GELU(x). One declaration per device; no torch header needed.
#pragma once

#include <cstdint>

namespace asvit_fast {

// A stack of `orders` + 1 contiguous rows of `count` values each: the value, then its derivatives with respect to t.
template <typename T>
struct TaylorRows {
  const T* input;  // [orders + 1, count]
  T* output;       // [orders + 1, count]
  int64_t count;
  int orders;  // 0, 1 or 2
};

// CPU: processes the columns begin <= i < end of the rows. One copy per instruction set.
template <typename T>
using GeluTaylorCpu = void(const TaylorRows<T>& rows, int64_t begin, int64_t end, bool tanh);

namespace portable {
GeluTaylorCpu<float> gelu_taylor_f32;
GeluTaylorCpu<double> gelu_taylor_f64;
}  // namespace portable
namespace avx2 {
GeluTaylorCpu<float> gelu_taylor_f32;
GeluTaylorCpu<double> gelu_taylor_f64;
}  // namespace avx2
namespace avx512 {
GeluTaylorCpu<float> gelu_taylor_f32;
GeluTaylorCpu<double> gelu_taylor_f64;
}  // namespace avx512

// CUDA: launches on `stream` (a cudaStream_t) and returns; T is float, double, __half or __nv_bfloat16.
enum class ScalarType { float32, float64, float16, bfloat16 };
void gelu_taylor_cuda(const void* input, void* output, int64_t count, int orders, bool tanh, ScalarType type,
                      void* stream);

}  // namespace asvit_fast
