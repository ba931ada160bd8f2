// CUDA kernel of softmax_taylor; formulas in cpu/softmax_taylor_kernel.h. No torch header.
#include "cuda/launch.h"
#include "cuda/team.h"
#include "softmax_taylor.h"

namespace asvit_fast {
namespace {

// `width` values of every order of one row, centred as far as the means are known.
template <typename T, int orders, int width>
struct Logits {
  using C = Compute<T>;
  const T* input;  // the row's first value
  int64_t stride;  // between orders
  C maximum;
  C means[orders + 1];

  __device__ inline Pack<T, width> load(int order, int64_t i) const {
    return *reinterpret_cast<const Pack<T, width>*>(input + order * stride + i);
  }
  __device__ inline C weight(T s) const { return exp(widen(s) - maximum); }
  // Where the weight is 0 so are the derivatives, whatever they are.
  __device__ inline C subtract_weighted_mean(int order, C weight, T s) const {
    return weight == C(0) ? C(0) : widen(s) - means[order];
  }
};

// Each team of threads takes a row and reads it four times, from the L1 cache but for the first: maximum, means, what
// the means lacked, result. exp is taken again instead of being stored: the memory is what limits the kernel.
template <typename T, int orders, int width>
__global__ void __launch_bounds__(kBlock)
    softmax_taylor_kernel(const T* __restrict__ input,  // [orders + 1, count, size]
                          T* __restrict__ output,       // [orders + 1, count, size]
                          int64_t count, int64_t size, Team team) {
  using C = Compute<T>;
  using Values = Pack<T, width>;
  const int64_t row = team.row(), stride = count * size;
  const bool exists = row < count;  // threads without a row still take part in the sums
  const int64_t begin = exists ? row * size : 0, end = exists ? size : 0;
  const int64_t first = static_cast<int64_t>(team.rank()) * width, step = static_cast<int64_t>(team.size) * width;
  constexpr C infinity = C(__builtin_huge_val());
  Logits<T, orders, width> logits{input + begin, stride, -infinity, {}};

#pragma unroll 1
  for (int64_t i = first; i < end; i += step) {
    const Values s = logits.load(0, i);
#pragma unroll
    for (int j = 0; j < width; ++j)
      logits.maximum = widen(s.values[j]) > logits.maximum ? widen(s.values[j]) : logits.maximum;
  }
  logits.maximum = team.largest(logits.maximum);

  C weights = 0, sums[orders + 1] = {};
#pragma unroll 1
  for (int64_t i = first; i < end; i += step) {
    Values s[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) s[order] = logits.load(order, i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const C weight = logits.weight(s[0].values[j]);
      weights += weight;
#pragma unroll
      for (int order = 1; order <= orders; ++order)
        sums[order] += weight * logits.subtract_weighted_mean(order, weight, s[order].values[j]);
    }
  }
  const C inverse = C(1) / team.sum(weights);
#pragma unroll
  for (int order = 1; order <= orders; ++order) logits.means[order] = team.sum(sums[order]) * inverse;

  C first_mean = 0, second_mean = 0;  // what <s'> lacked, <e + d^2>
  if constexpr (orders >= 1) {
#pragma unroll 1
    for (int64_t i = first; i < end; i += step) {
      Values s[orders + 1];
#pragma unroll
      for (int order = 0; order <= orders; ++order) s[order] = logits.load(order, i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const C weight = logits.weight(s[0].values[j]);
        const C d = logits.subtract_weighted_mean(1, weight, s[1].values[j]);
        first_mean += weight * d;
        if constexpr (orders >= 2)
          second_mean += weight * (logits.subtract_weighted_mean(2, weight, s[2].values[j]) + d * d);
      }
    }
    first_mean = team.sum(first_mean) * inverse;
    if constexpr (orders >= 2) second_mean = team.sum(second_mean) * inverse - first_mean * first_mean;
  }

#pragma unroll 1
  for (int64_t i = first; i < end; i += step) {
    Values s[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) s[order] = logits.load(order, i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const C weight = logits.weight(s[0].values[j]);
      const C p = weight * inverse;
      s[0].values[j] = narrow<T>(p);
      if constexpr (orders >= 1) {
        const C d = logits.subtract_weighted_mean(1, weight, s[1].values[j]) - first_mean;
        s[1].values[j] = narrow<T>(p * d);
        if constexpr (orders >= 2)
          s[2].values[j] =
              narrow<T>(p * (logits.subtract_weighted_mean(2, weight, s[2].values[j]) + d * d - second_mean));
      }
    }
#pragma unroll
    for (int order = 0; order <= orders; ++order)
      *reinterpret_cast<Values*>(output + order * stride + begin + i) = s[order];
  }
}

template <typename T, int orders, int width>
void launch(const TaylorMatrix<void>& matrix, cudaStream_t stream) {
  const Team team = team_for(matrix.size, width);
  launch_kernel(softmax_taylor_kernel<T, orders, width>, blocks_for(matrix.count, team), kBlock, stream,
                static_cast<const T*>(matrix.input), static_cast<T*>(matrix.output), matrix.count, matrix.size, team);
}

}  // namespace

void softmax_taylor_cuda(const TaylorMatrix<void>& matrix, ScalarType type, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  with_type<__half, __nv_bfloat16>(type, [&](auto element) {
    using T = decltype(element);
    with_orders(matrix.orders, [&](auto orders) {
      if (in_vectors<T>(matrix)) {
        launch<T, orders(), kVectorBytes / sizeof(T)>(matrix, on);
      } else {
        launch<T, orders(), 1>(matrix, on);
      }
    });
  });
}

}  // namespace asvit_fast
