// CUDA kernel of all elementwise Taylor ops. No torch header: raw pointers and a stream, so that it compiles in
// seconds.
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "unary_functions.h"
#include "unary_taylor.h"

namespace asvit_fast {
namespace {

constexpr int kThreads = 256;

// The arithmetic of unary_functions.h. NaN passes all comparisons.
template <typename T>
struct DeviceMath {
  using Scalar = T;
  using Value = T;
  struct Exponential {
    T value, minus_one;
  };
  static __device__ inline T broadcast(T x) { return x; }
  static __device__ inline T absolute(T x) { return fabs(x); }
  static __device__ inline T clamp(T x, T low, T high) { return x < low ? low : x > high ? high : x; }
  static __device__ inline Exponential exponential(T x) { return {exp(x), expm1(x)}; }
  static __device__ inline T normal_tail(T x, T) { return T(0.5) * erfc(T(0.70710678118654752) * x); }
};

// Each thread maps `width` columns of all rows.
template <typename T, typename Function, int orders, int width>
__global__ void __launch_bounds__(kThreads)
    unary_taylor_kernel(const T* __restrict__ input,  // [orders + 1, count]
                        T* __restrict__ output,       // [orders + 1, count]
                        int64_t count,
                        const Compute<T>* __restrict__ bias,  // [channels] or null
                        int64_t channels) {
  using C = Compute<T>;
  using Columns = Pack<T, width>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * width;
  if (column >= count) return;
  Columns rows[orders + 1];
#pragma unroll
  for (int order = 0; order <= orders; ++order)
    rows[order] = *reinterpret_cast<const Columns*>(input + order * count + column);
  int64_t channel = bias ? column % channels : 0;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    C x = widen(rows[0].values[i]);
    if (bias) {
      x += bias[channel];
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
    const Derivatives<C> f = Function::at(x);
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

template <typename T, typename Function, int orders, int width>
void launch(const TaylorRows<void>& rows, cudaStream_t stream) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * width;
  const auto blocks = static_cast<unsigned>((rows.count + per_block - 1) / per_block);  // grid.x: up to 2^31 - 1
  launch_kernel(unary_taylor_kernel<T, Function, orders, width>, blocks, kThreads, stream,
                static_cast<const T*>(rows.input), static_cast<T*>(rows.output), rows.count,
                static_cast<const Compute<T>*>(rows.bias), rows.channels);
}

}  // namespace

void unary_taylor_cuda(const TaylorRows<void>& rows, UnaryFunction function, ScalarType type, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  with_type<__half, __nv_bfloat16>(type, [&](auto element) {
    using T = decltype(element);
    constexpr int width = kVectorBytes / sizeof(T);
    with_function<DeviceMath<Compute<T>>>(function, [&](auto f) {
      with_orders(rows.orders, [&](auto orders) {
        // rows start on a vector boundary only if their length is a whole number of vectors
        if (aligned(rows.input, rows.output) && rows.count % width == 0) {
          launch<T, decltype(f), orders(), width>(rows, on);
        } else {
          launch<T, decltype(f), orders(), 1>(rows, on);
        }
      });
    });
  });
}

}  // namespace asvit_fast
