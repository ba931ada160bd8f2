// CUDA kernel of gelu_taylor. No torch header: raw pointers and a stream, so that it compiles in seconds.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "gelu_taylor.h"

namespace asvit_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // one load instruction per thread and row

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Spelled out, as torch compiles with the implicit conversions of half types switched off.
__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrow(Compute<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename C>
struct Derivatives {
  C value, first, second;
};

// GELU(x) = x P(x); P, P' and P'' of the normal distribution. x is within +-40.
template <typename C>
__device__ Derivatives<C> normal_gate(C x) {
  const C density = C(0.39894228040143268) * exp(C(-0.5) * x * x);
  return {C(0.5) * erfc(C(-0.70710678118654752) * x), density, -x * density};
}

// ... of the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3), the tanh approximation
template <typename C>
__device__ Derivatives<C> logistic_gate(C x) {
  constexpr C slope = C(1.5957691216057308), cubic = C(0.044715);
  const C square = x * x;
  const C u = slope * x * (C(1) + cubic * square);
  const C u1 = slope * (C(1) + C(3) * cubic * square);
  const C u2 = C(6) * slope * cubic * x;
  const C e = exp(-fabs(u));
  const C inverse = C(1) / (C(1) + e);
  const C small = e * inverse;
  const C product = small * inverse;
  const C balance = (inverse - small) * (u < C(0) ? C(1) : C(-1));  // 1 - 2 P
  return {u < C(0) ? small : inverse, product * u1, product * (balance * u1 * u1 + u2)};
}

template <bool tanh, typename C>
__device__ Derivatives<C> gelu(C x) {
  // beyond +-40 the derivatives of P are 0; NaN passes both comparisons
  const C z = x < C(-40) ? C(-40) : x > C(40) ? C(40) : x;
  const Derivatives<C> gate = tanh ? logistic_gate(z) : normal_gate(z);
  return {x * gate.value, gate.value + z * gate.first, C(2) * gate.first + z * gate.second};
}

// `width` neighbouring values, loaded and stored with one instruction.
template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T values[width];
};

// Each thread maps `width` columns of all rows. input, output: [orders + 1, count]
template <typename T, int orders, bool tanh, int width>
__global__ void __launch_bounds__(kThreads)
    gelu_taylor_kernel(const T* __restrict__ input, T* __restrict__ output, int64_t count) {
  using C = Compute<T>;
  using Columns = Pack<T, width>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width;
  if (column >= count) return;
  Columns rows[orders + 1];
#pragma unroll
  for (int order = 0; order <= orders; ++order)
    rows[order] = *reinterpret_cast<const Columns*>(input + order * count + column);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const Derivatives<C> f = gelu<tanh>(widen(rows[0].values[i]));
    rows[0].values[i] = narrow<T>(f.value);
    if constexpr (orders >= 1) {
      const C x1 = widen(rows[1].values[i]);
      rows[1].values[i] = narrow<T>(f.first * x1);
      if constexpr (orders >= 2)
        rows[2].values[i] = narrow<T>(f.first * widen(rows[2].values[i]) + f.second * (x1 * x1));
    }
  }
#pragma unroll
  for (int order = 0; order <= orders; ++order)
    *reinterpret_cast<Columns*>(output + order * count + column) = rows[order];
}

struct Launch {
  const void* input;
  void* output;
  int64_t count;
  int orders;
  bool tanh;
  cudaStream_t stream;

  template <typename T, int orders_, bool tanh_, int width>
  void run() const {
    const int64_t per_block = static_cast<int64_t>(kThreads) * width;
    const auto blocks = static_cast<unsigned>((count + per_block - 1) / per_block);  // grid.x: up to 2^31 - 1
    gelu_taylor_kernel<T, orders_, tanh_, width>
        <<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(input), static_cast<T*>(output), count);
  }

  // Rows start on a vector boundary only if their length is a whole number of vectors.
  template <typename T, int orders_, bool tanh_>
  void choose_width() const {
    constexpr int width = kVectorBytes / sizeof(T);
    const bool aligned = (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output)) % kVectorBytes == 0;
    if (aligned && count % width == 0) {
      run<T, orders_, tanh_, width>();
    } else {
      run<T, orders_, tanh_, 1>();
    }
  }

  template <typename T, int orders_>
  void choose_gate() const {
    tanh ? choose_width<T, orders_, true>() : choose_width<T, orders_, false>();
  }

  template <typename T>
  void choose_orders() const {
    switch (orders) {
      case 0:
        return choose_gate<T, 0>();
      case 1:
        return choose_gate<T, 1>();
      default:
        return choose_gate<T, 2>();
    }
  }
};

}  // namespace

void gelu_taylor_cuda(const void* input, void* output, int64_t count, int orders, bool tanh, ScalarType type,
                      void* stream) {
  const Launch launch{input, output, count, orders, tanh, static_cast<cudaStream_t>(stream)};
  switch (type) {
    case ScalarType::float32:
      return launch.choose_orders<float>();
    case ScalarType::float64:
      return launch.choose_orders<double>();
    case ScalarType::float16:
      return launch.choose_orders<__half>();
    case ScalarType::bfloat16:
      return launch.choose_orders<__nv_bfloat16>();
  }
}

}  // namespace asvit_fast
