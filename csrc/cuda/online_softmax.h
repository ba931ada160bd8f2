// Softmax of scores that come in pieces, for the CUDA kernels of attention on series.
#pragma once

#include <cuda_runtime.h>

#include "attention_series.h"
#include "cuda/ptx.h"

namespace asvit_fast {
namespace {

// Taylor coefficient of an order, given the derivative.
template <typename T>
__device__ T coefficient(int order, T derivative) {
  return order == 2 ? T(0.5) * derivative : derivative;
}

__device__ inline double exponential(double x) { return exp(x); }

// One instruction after the product: a weight's error of |x| 2^-24 is at most 2^-25 of the largest weight.
__device__ inline float exponential(float x) { return exp2_approximate(1.4426950408889634f * x); }

__device__ inline double reciprocal(double x) { return 1.0 / x; }
__device__ inline float reciprocal(float x) { return reciprocal_approximate(x); }

// Scores of a row, shared by `lanes` neighbouring lanes, to weights; `factor` is what earlier sums are to be multiplied
// with. The reference is the same in all lanes. Each lane's total counts its own keys; so that totals of all lanes add
// up after they were rescaled, what every lane knows of all keys goes into it as its share.
template <typename T, int orders, int keys, int lanes>
__device__ void online_softmax_step(T (&scores)[keys][orders + 1], SoftmaxState<orders, T>& state,
                                    T (&factor)[orders + 1]) {
  const T before = state.reference[0];
  T maximum = before;
#pragma unroll
  for (int i = 0; i < keys; ++i) maximum = scores[i][0] > maximum ? scores[i][0] : maximum;
#pragma unroll
  for (int lane = 1; lane < lanes; lane *= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, maximum, lane);
    maximum = other > maximum ? other : maximum;
  }
  state.reference[0] = maximum;
  T sums[3] = {};  // of the weights, and with s[1], s[2]
#pragma unroll
  for (int i = 0; i < keys; ++i) {
    scores[i][0] = exponential(scores[i][0] - maximum);
    sums[0] += scores[i][0];
#pragma unroll
    for (int order = 1; order <= orders; ++order) sums[order] += scores[i][0] * scores[i][order];
  }
#pragma unroll
  for (int order = 0; order <= orders; ++order) {
#pragma unroll
    for (int lane = 1; lane < lanes; lane *= 2) sums[order] += __shfl_xor_sync(0xffffffffu, sums[order], lane);
    sums[order] *= T(1) / lanes;
  }
  const T decay = exponential(before - maximum);
  rescale_state<T, orders>(state, decay, reciprocal(next_total<T>(state, decay, sums[0])), sums[1], sums[2], factor);
  state.total[0] += sums[0];
#pragma unroll
  for (int i = 0; i < keys; ++i) {
#pragma unroll
    for (int order = 1; order <= orders; ++order) scores[i][order] -= state.reference[order];
    exp_series<T, orders>(scores[i], scores[i][0]);
#pragma unroll
    for (int order = 1; order <= orders; ++order) state.total[order] += scores[i][order];
  }
}

}  // namespace
}  // namespace asvit_fast
