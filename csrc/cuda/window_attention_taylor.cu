// CUDA kernels of window_attention_taylor. No torch header: raw pointers and a stream, so that they compile in seconds.
//
// Float32 up to 64 components runs on tensor cores (attention_tensor_core.h). The kernel here is for the rest:
// A query belongs to `group` neighbouring lanes with `width` components each, whose partial scores meet by shuffles.
// All queries of a block walk through the keys of their window in tiles in shared memory, kKeys keys at a time in
// registers: nothing of size tokens x tokens exists.
#include <cuda_runtime.h>

#include "attention_series.h"
#include "constant.h"
#include "cuda/attention_tensor_core.h"
#include "cuda/launch.h"
#include "cuda/online_softmax.h"
#include "window_attention_taylor.h"

namespace asvit_fast {
namespace {

constexpr int kMaximumThreads = 128;
constexpr int kSharedBytes = 24 * 1024;  // for keys and values: several blocks fit a multiprocessor

template <typename T, int dim>
constexpr int kKeys = (dim <= 128 ? 32 : 16) / static_cast<int>(sizeof(T));  // at a time in registers

// Keys of a tile: as many as fit, in whole register blocks, but no more than there are threads to look up their place.
template <typename T, int orders, int dim>
constexpr int tile_keys() {
  const int fit = kSharedBytes / (2 * (orders + 1) * dim * static_cast<int>(sizeof(T)));
  return fit > 64 ? 64 : fit / kKeys<T, dim> * kKeys<T, dim>;
}

template <typename T, int orders, int dim>
struct SharedTile {
  static constexpr int kCount = tile_keys<T, orders, dim>();
  alignas(16) T keys[kCount][orders + 1][dim];
  alignas(16) T values[kCount][orders + 1][dim];
  int64_t key_offsets[kCount], value_offsets[kCount], places[kCount];
};

// Keys first <= i < first + count of the window as Taylor coefficients; zeros beyond, and beyond head_dim.
template <typename T, int orders, int dim>
__device__ void load_tile(const WindowAttentionTaylor<T>& problem, const AttentionWindow& window, int first, int count,
                          SharedTile<T, orders, dim>& tile) {
  constexpr int kCount = SharedTile<T, orders, dim>::kCount;
  for (int key = threadIdx.x; key < count; key += blockDim.x) {
    tile.key_offsets[key] = token_offset(window, problem.k.strides, first + key);
    tile.value_offsets[key] = token_offset(window, problem.v.strides, first + key);
    tile.places[key] = token_in_window(window, problem.columns.window, first + key);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kCount * (orders + 1) * dim; i += blockDim.x) {
    const int component = i % dim, order = i / dim % (orders + 1), key = i / (dim * (orders + 1));
    T k = T(0), v = T(0);
    if (key < count && component < problem.head_dim) {
      const AttentionStrides &ks = problem.k.strides, &vs = problem.v.strides;
      k = problem.k.data[tile.key_offsets[key] + order * ks.order + component * ks.component];
      v = problem.v.data[tile.value_offsets[key] + order * vs.order + component * vs.component];
    }
    tile.keys[key][order][component] = coefficient(order, k);
    tile.values[key][order][component] = coefficient(order, v);
  }
  __syncthreads();
}

// Scores of kKeys keys from `key` of the tile: this lane's components, then the sum over the group.
template <typename T, int orders, int width, int group>
__device__ void score(const T (&query)[width][orders + 1], const SharedTile<T, orders, width * group>& tile, int key,
                      int begin, T (&scores)[kKeys<T, width * group>][orders + 1]) {
#pragma unroll
  for (int i = 0; i < kKeys<T, width * group>; ++i) {
#pragma unroll
    for (int order = 0; order <= orders; ++order) scores[i][order] = T(0);
#pragma unroll
    for (int c = 0; c < width; ++c) {
      T k[orders + 1];
#pragma unroll
      for (int order = 0; order <= orders; ++order) k[order] = tile.keys[key + i][order][begin + c];
      add_product<orders>(scores[i], query[c], k);
    }
#pragma unroll
    for (int order = 0; order <= orders; ++order)
#pragma unroll
      for (int lanes = group / 2; lanes > 0; lanes /= 2)
        scores[i][order] += __shfl_xor_sync(0xffffffffu, scores[i][order], lanes);
  }
}

template <typename T, int orders, int width, int group>
__global__ void __launch_bounds__(kMaximumThreads, 1)
    window_attention_taylor_kernel(const WindowAttentionTaylor<T> problem, unsigned blocks_per_window) {
  constexpr int dim = width * group, keys = kKeys<T, dim>;
  __shared__ SharedTile<T, orders, dim> tile;

  const AttentionWindow window = window_at(problem, blockIdx.x / blocks_per_window);
  const int tokens = static_cast<int>(window.tokens());
  const int first = static_cast<int>(blockIdx.x % blocks_per_window) * static_cast<int>(blockDim.x / group);
  if (first >= tokens) return;  // the whole block: this window is cut off by the edge of the map
  const int lane = static_cast<int>(threadIdx.x);
  const bool active = first + lane / group < tokens;
  const int token = active ? first + lane / group : first;
  const int begin = lane % group * width;  // this lane's components

  T query[width][orders + 1], sums[width][orders + 1];
  const T* from = problem.q.data + token_offset(window, problem.q.strides, token);
#pragma unroll
  for (int c = 0; c < width; ++c) {
#pragma unroll
    for (int order = 0; order <= orders; ++order) {
      const AttentionStrides& strides = problem.q.strides;
      query[c][order] =
          begin + c < problem.head_dim
              ? coefficient(order, problem.scale * from[order * strides.order + (begin + c) * strides.component])
              : T(0);
      sums[c][order] = T(0);
    }
  }
  const int64_t all = problem.rows.window * problem.columns.window;  // tokens of a whole window
  const T* bias = problem.bias;
  if (bias) bias += (window.head * all + token_in_window(window, problem.columns.window, token)) * all;

  SoftmaxState<orders, T> state = {};
  state.reference[0] = kLowest<T>;
  for (int key = 0; key < tokens; key += tile.kCount) {
    const int count = tokens - key < tile.kCount ? tokens - key : tile.kCount;
    if (key > 0) __syncthreads();  // all threads are done with the tile before
    load_tile(problem, window, key, count, tile);
    for (int i = 0; i < count; i += keys) {
      T weights[keys][orders + 1], factor[orders + 1];
      score<T, orders, width, group>(query, tile, i, begin, weights);
#pragma unroll
      for (int j = 0; j < keys; ++j) {
        if (bias && i + j < count) weights[j][0] += bias[tile.places[i + j]];
        if (i + j >= count) weights[j][0] = -INFINITY;
      }
      online_softmax_step<T, orders, keys, 1>(weights, state, factor);
#pragma unroll
      for (int c = 0; c < width; ++c) {
        multiply_series<orders>(sums[c], factor);
#pragma unroll
        for (int j = 0; j < keys; ++j) {
          T v[orders + 1];
#pragma unroll
          for (int order = 0; order <= orders; ++order) v[order] = tile.values[i + j][order][begin + c];
          add_product<orders>(sums[c], weights[j], v);
        }
      }
    }
  }
  if (!active) return;
  const AttentionStrides strides = output_strides(problem);
  T* to = problem.output + token_offset(window, strides, token);
  const T inverse = T(1) / state.total[0];
#pragma unroll
  for (int c = 0; c < width; ++c) {
    if (begin + c >= problem.head_dim) break;
    divide_series<orders>(sums[c], state.total, inverse);
#pragma unroll
    for (int order = 0; order <= orders; ++order)
      to[order * strides.order + begin + c] = order == 2 ? T(2) * sums[c][order] : sums[c][order];
  }
}

template <typename T, int orders, int width, int group>
void launch(const WindowAttentionTaylor<T>& problem, cudaStream_t stream) {
  const int64_t lanes = problem.rows.window * problem.columns.window * group;
  const int threads = lanes <= kMaximumThreads / 2 ? kMaximumThreads / 2 : kMaximumThreads;
  const int64_t blocks_per_window = (lanes + threads - 1) / threads;
  const auto blocks = static_cast<unsigned>(window_count(problem) * blocks_per_window);  // grid.x: up to 2^31 - 1
  launch_kernel(window_attention_taylor_kernel<T, orders, width, group>, blocks, threads, stream, problem,
                static_cast<unsigned>(blocks_per_window));
}

// The narrowest kernel that holds head_dim.
template <typename T, int orders>
void choose_layout(const WindowAttentionTaylor<T>& problem, cudaStream_t stream) {
  const int64_t dim = problem.head_dim;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dim <= 8) return launch_tensor_kernel<orders, 8>(problem, stream);
    if (dim <= 16) return launch_tensor_kernel<orders, 16>(problem, stream);
    if (dim <= 24) return launch_tensor_kernel<orders, 24>(problem, stream);
    if (dim <= 32) return launch_tensor_kernel<orders, 32>(problem, stream);
    if (dim <= 48) return launch_tensor_kernel<orders, 48>(problem, stream);
    if (dim <= 64) return launch_tensor_kernel<orders, 64>(problem, stream);
  } else if (dim <= 16) {
    return launch<T, orders, 4, 4>(problem, stream);
  }
  launch<T, orders, kMaximumHeadDimCuda / 32, 32>(problem, stream);
}

template <typename T>
void choose_orders(const WindowAttentionTaylor<T>& problem, cudaStream_t stream) {
  with_orders(problem.orders, [&](auto orders) { choose_layout<T, orders()>(problem, stream); });
}

}  // namespace

void window_attention_taylor_cuda(const WindowAttentionTaylor<float>& problem, void* stream) {
  choose_orders(problem, static_cast<cudaStream_t>(stream));
}

void window_attention_taylor_cuda(const WindowAttentionTaylor<double>& problem, void* stream) {
  choose_orders(problem, static_cast<cudaStream_t>(stream));
}

}  // namespace asvit_fast
