// CUDA kernel of layer_norm_taylor; formulas in cpu/layer_norm_taylor_kernel.h. No torch header.
#include "cuda/launch.h"
#include "cuda/team.h"
#include "layer_norm_taylor.h"

namespace asvit_fast {
namespace {

// Each team of threads takes a row and reads it three times, from the L1 cache but for the first: mean, products,
// result. A thread has `width` neighbouring values at a time.
template <typename T, int orders, int width>
__global__ void __launch_bounds__(kBlock)
    layer_norm_taylor_kernel(const T* __restrict__ input,  // [orders + 1, count, size]
                             T* __restrict__ output,       // [orders + 1, count, size]
                             int64_t count, int64_t size,
                             const Compute<T>* __restrict__ weight,  // [size] or null
                             const Compute<T>* __restrict__ bias,    // [size] or null
                             Compute<T> eps, Team team) {
  using C = Compute<T>;
  using Values = Pack<T, width>;
  const int64_t row = team.row(), stride = count * size;
  const bool exists = row < count;  // threads without a row still take part in the sums
  const int64_t begin = exists ? row * size : 0, end = exists ? size : 0;
  const int64_t first = static_cast<int64_t>(team.rank()) * width, step = static_cast<int64_t>(team.size) * width;
  const auto values = [&](int order, int64_t i) {
    return *reinterpret_cast<const Values*>(input + order * stride + begin + i);
  };

  C means[orders + 1] = {};
  for (int64_t i = first; i < end; i += step) {
#pragma unroll
    for (int order = 0; order <= orders; ++order) {
      const Values x = values(order, i);
#pragma unroll
      for (int j = 0; j < width; ++j) means[order] += widen(x.values[j]);
    }
  }
#pragma unroll
  for (int order = 0; order <= orders; ++order) means[order] = team.sum(means[order]) / C(size);

  C square = 0, cross = 0, mixed = 0;  // c c, c c', c' c' + c c''
  for (int64_t i = first; i < end; i += step) {
    Values x[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) x[order] = values(order, i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const C c = widen(x[0].values[j]) - means[0];
      square += c * c;
      if constexpr (orders >= 1) {
        const C c1 = widen(x[1].values[j]) - means[1];
        cross += c * c1;
        if constexpr (orders >= 2) mixed += c1 * c1 + c * (widen(x[2].values[j]) - means[2]);
      }
    }
  }
  const C variance = team.sum(square) / C(size) + eps;
  const C r = C(1) / sqrt(variance);
  C a = 0, b = 0;
  if constexpr (orders >= 1) a = team.sum(cross) / C(size) / variance;
  if constexpr (orders >= 2) b = team.sum(mixed) / C(size) / variance;

  for (int64_t i = first; i < end; i += step) {
    Values x[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) x[order] = values(order, i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const C scale = weight ? weight[i + j] * r : r;
      const C u = (widen(x[0].values[j]) - means[0]) * scale;
      x[0].values[j] = narrow<T>(bias ? u + bias[i + j] : u);
      if constexpr (orders >= 1) {
        const C u1 = (widen(x[1].values[j]) - means[1]) * scale;
        x[1].values[j] = narrow<T>(u1 - a * u);
        if constexpr (orders >= 2) {
          const C u2 = (widen(x[2].values[j]) - means[2]) * scale;
          x[2].values[j] = narrow<T>(u2 - C(2) * a * u1 + (C(3) * a * a - b) * u);
        }
      }
    }
#pragma unroll
    for (int order = 0; order <= orders; ++order)
      *reinterpret_cast<Values*>(output + order * stride + begin + i) = x[order];
  }
}

template <typename T, int orders, int width>
void launch(const TaylorMatrix<void>& matrix, const void* weight, const void* bias, double eps, cudaStream_t stream) {
  using C = Compute<T>;
  const Team team = team_for(matrix.size, width);
  launch_kernel(layer_norm_taylor_kernel<T, orders, width>, blocks_for(matrix.count, team), kBlock, stream,
                static_cast<const T*>(matrix.input), static_cast<T*>(matrix.output), matrix.count, matrix.size,
                static_cast<const C*>(weight), static_cast<const C*>(bias), static_cast<C>(eps), team);
}

}  // namespace

void layer_norm_taylor_cuda(const TaylorMatrix<void>& matrix, const void* weight, const void* bias, double eps,
                            ScalarType type, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  with_type<__half, __nv_bfloat16>(type, [&](auto element) {
    using T = decltype(element);
    with_orders(matrix.orders, [&](auto orders) {
      if (in_vectors<T>(matrix)) {
        launch<T, orders(), kVectorBytes / sizeof(T)>(matrix, weight, bias, eps, on);
      } else {
        launch<T, orders(), 1>(matrix, weight, bias, eps, on);
      }
    });
  });
}

}  // namespace asvit_fast
