// window_attention_taylor in float32 on tensor cores, for head_dim up to 64.
//
// A warp has 16 queries, and walks through the keys of their window in tiles in shared memory, 8 or 16 keys at a time.
// The scores of an order are one product whose inner dimension is the components of all pairs of orders,
//   s[2] = [q[0] q[1] q[2]] [k[2] k[1] k[0]]^T, and so are the sums y[2] = [p[0] p[1] p[2]] [v[2] v[1] v[0]].
//
// Precision: x = high + low, both with the 11 bits of TF32, but for 2^-23 |x|; of the four products low low, at most
// 2^-22 of the whole, is left out where no exponential follows. Tensor cores truncate sums: small products come first,
// and a product is over 8 components or keys of each order, from zero; float32 additions, which round, do the rest.
// What is not finite in q, k or v makes NaN.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/online_softmax.h"
#include "cuda/ptx.h"

namespace asvit_fast {
namespace {

constexpr int kTile = 8;  // keys, and components, of one instruction; of queries it has two
constexpr int kWarp = 32;

// How a kernel for heads of at most `dim` components shares out its work and memory.
template <int orders, int dim>
struct TensorLayout {
  static constexpr int kNumbers = (orders + 1) * dim;  // of a token's query, key or value
  // In shared memory already: high and low parts are twice the bytes. A query is split by one warp only, for all keys.
  static constexpr bool kSplitQueries = dim <= 8, kSplitKeys = dim <= 16;
  static constexpr int kQueryBytes = kNumbers * (kSplitQueries ? 8 : 4), kKeyBytes = kNumbers * (kSplitKeys ? 16 : 8);
  static constexpr int kWarps = 4 * 2 * kTile * kQueryBytes <= 24 * 1024 ? 4 : 2;  // of a block, at most
  // Warps of a multiprocessor, at least: this is what leaves each thread as many registers as it needs.
  static constexpr int kResident = orders == 0 ? 16 : (kNumbers < 144 ? 12 : 8);
  static constexpr int kBlocks = kResident / kWarps;
  static constexpr int kQueries = 2 * kTile * kWarps;
  static constexpr bool kSharedStates = kNumbers >= 128;  // where sums fill the registers
  // Keys that fit beside the queries: a block may have 48 KiB, with states 38, for six. Tiles of keys at a time.
  static constexpr int kFit = ((kSharedStates ? 37 : 46) * 1024 - kQueries * kQueryBytes) / kKeyBytes;
  static constexpr int kStep = kNumbers < 48 || orders == 0 ? 2 : 1;
  static constexpr int kKeys = kFit >= 64 ? 64 : kFit / (kStep * kTile) * (kStep * kTile);
};

// `count` numbers of a thread as the sum of two with 11 significant bits each.
template <int count>
struct Split {
  float high[count], low[count];
};

template <int count>
__device__ Split<count> split(const float (&x)[count]) {
  Split<count> parts;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    parts.high[i] = __uint_as_float((__float_as_uint(x[i]) + 0x1000u) & ~0x1fffu);  // to nearest
    parts.low[i] = x[i] - parts.high[i];
  }
  return parts;
}

// The same in shared memory, split or whole.
template <int count, bool is_split>
struct alignas(sizeof(float) * count * (is_split ? 2 : 1)) Stored {
  float values[is_split ? 2 * count : count];

  __device__ void set(const float (&x)[count]) {
    const Split<count> parts = split(x);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = is_split ? parts.high[i] : x[i];
      if constexpr (is_split) values[count + i] = parts.low[i];
    }
  }

  __device__ Split<count> get() const {
    if constexpr (is_split) {
      Split<count> parts;
#pragma unroll
      for (int i = 0; i < count; ++i) parts.high[i] = values[i], parts.low[i] = values[count + i];
      return parts;
    } else {
      return split(values);
    }
  }
};

// Values as the lanes of a warp have them in multiply_tf32. Inside of 8 components or keys, lanes have neighbours: the
// inner index 2i of a product is an instruction's i, 2i + 1 its i + 4.
template <int orders, int dim>
struct TensorTile {
  using Layout = TensorLayout<orders, dim>;
  Stored<4, Layout::kSplitQueries> queries[Layout::kWarps][dim / kTile][orders + 1][kWarp];
  Stored<2, Layout::kSplitKeys> keys[Layout::kKeys / kTile][dim / kTile][orders + 1][kWarp];
  Stored<2, Layout::kSplitKeys> values[Layout::kKeys / kTile][dim / kTile][orders + 1][kWarp];
  int64_t key_offsets[Layout::kKeys], value_offsets[Layout::kKeys];
  // What is used between products only lies here, too: registers are for products.
  SoftmaxState<orders, float> states[Layout::kSharedStates ? Layout::kWarps * kWarp : 1][2];  // of a thread's rows
  AttentionWindow window;
  int first;                            // query of the block
  const float* bias[Layout::kQueries];  // of each query
  uint32_t places[Layout::kKeys];       // only a bias asks for them, which has the square of their number

  // Of the warp's queries.
  __device__ int first_query() const { return first + static_cast<int>(threadIdx.x) / kWarp * 2 * kTile; }
  __device__ bool has_queries() const { return first_query() < window.tokens(); }
};

// A thread's place in its warp, as multiply_tf32 numbers them.
struct Lane {
  int index, row, column;

  __device__ Lane() : index(threadIdx.x % kWarp), row(index / 4), column(index % 4) {}
};

// One Taylor coefficient of a token whose order 0, component 0 is at `offset`; 0 beyond head_dim and for no token.
__device__ inline float coefficient_at(const AttentionOperand<float>& operand, int64_t offset, int order, int component,
                                       bool valid) {
  if (!valid) return 0.0f;
  const AttentionStrides& strides = operand.strides;
  return coefficient(order, operand.data[offset + order * strides.order + component * strides.component]);
}

// The warp's queries. Every lane reads back only what it wrote.
template <int orders, int dim>
__device__ void load_queries(const WindowAttentionTaylor<float>& problem, TensorTile<orders, dim>& shared) {
  const Lane lane;
  const AttentionWindow& window = shared.window;
  const int tokens = static_cast<int>(window.tokens()), first = shared.first_query();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t all = problem.rows.window * problem.columns.window;  // tokens of a whole window
  int64_t offsets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = kTile * i + lane.row, token = first + row < tokens ? first + row : 0;
    offsets[i] = token_offset(window, problem.q.strides, token);
    const int64_t place = token_in_window(window, problem.columns.window, token);
    if (problem.bias && lane.column == 0)
      shared.bias[2 * kTile * warp + row] = problem.bias + (window.head * all + place) * all;
  }
  for (int tile = 0; tile < dim / kTile; ++tile) {
#pragma unroll
    for (int order = 0; order <= orders; ++order) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int component = kTile * tile + 2 * lane.column + i / 2, token = first + kTile * (i % 2) + lane.row;
        const bool valid = token < tokens && component < problem.head_dim;
        x[i] = problem.scale * coefficient_at(problem.q, offsets[i % 2], order, component, valid);
      }
      shared.queries[warp][tile][order][lane.index].set(x);
    }
  }
}

// Keys first <= i < first + count of the window and their values; zeros up to a whole tile of 8.
template <int orders, int dim>
__device__ void load_keys(const WindowAttentionTaylor<float>& problem, int first, int count,
                          TensorTile<orders, dim>& shared) {
  const AttentionWindow& window = shared.window;
  for (int key = static_cast<int>(threadIdx.x); key < count; key += static_cast<int>(blockDim.x)) {
    shared.key_offsets[key] = token_offset(window, problem.k.strides, first + key);
    shared.value_offsets[key] = token_offset(window, problem.v.strides, first + key);
    shared.places[key] = static_cast<uint32_t>(token_in_window(window, problem.columns.window, first + key));
  }
  __syncthreads();
  const Lane lane;
  const int tiles = (count + kTile - 1) / kTile * (dim / kTile), warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = static_cast<int>(threadIdx.x) / kWarp; i < tiles; i += warps) {
    const int keys = i / (dim / kTile), components = i % (dim / kTile);
    const int key = kTile * keys + lane.row, component = kTile * components + 2 * lane.column;
    const int value = kTile * keys + 2 * lane.column, of_value = kTile * components + lane.row;
    const bool valid[2] = {key < count && component < problem.head_dim,
                           key < count && component + 1 < problem.head_dim};
    const bool valid_value[2] = {value < count && of_value < problem.head_dim,
                                 value + 1 < count && of_value < problem.head_dim};
#pragma unroll
    for (int order = 0; order <= orders; ++order) {
      float k[2], v[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        k[j] = coefficient_at(problem.k, shared.key_offsets[key], order, component + j, valid[j]);
        v[j] = coefficient_at(problem.v, shared.value_offsets[value + j], order, of_value, valid_value[j]);
      }
      shared.keys[keys][components][order][lane.index].set(k);
      shared.values[keys][components][order][lane.index].set(v);
    }
  }
  __syncthreads();
}

// c(t) = a(t) b(t), matrices of series. `exponents`: order 0 goes through exp, where every bit of a large score counts.
template <int orders, bool exponents>
__device__ void multiply_tiles(const Split<4> (&a)[orders + 1], const Split<2> (&b)[orders + 1],
                               float (&c)[orders + 1][4]) {
#pragma unroll
  for (int order = 0; order <= orders; ++order) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[order][i] = 0.0f;
    if (exponents && order == 0) multiply_tf32(c[0], a[0].low, b[0].low);
#pragma unroll
    for (int i = 0; i <= order; ++i) {
      multiply_tf32(c[order], a[i].low, b[order - i].high);
      multiply_tf32(c[order], a[i].high, b[order - i].low);
    }
#pragma unroll
    for (int i = 0; i <= order; ++i) multiply_tf32(c[order], a[i].high, b[order - i].high);
  }
}

// What a lane knows of its two rows of queries.
template <int orders>
using RowStates = SoftmaxState<orders, float>[2];
template <int orders, int dim>
using Sums = float[dim / kTile][4][orders + 1];  // as multiply_tf32 has them

// `tiles` tiles of keys from key `first` of the block's; of those that are not `whole`, keys from `count` on are none.
template <int orders, int dim, int tiles, bool whole>
__device__ void attend_to(const TensorTile<orders, dim>& shared, bool biased, int first, int count,
                          RowStates<orders>& states, Sums<orders, dim>& sums) {
  const Lane lane;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  float scores[2][2 * tiles][orders + 1];  // [row][key]
#pragma unroll
  for (int component = 0; component < dim / kTile; ++component) {
    if (TensorLayout<orders, dim>::kNumbers >= 48) __syncwarp();  // else compilers keep all queries in registers
    Split<4> q[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) q[order] = shared.queries[warp][component][order][lane.index].get();
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      Split<2> k[orders + 1];
#pragma unroll
      for (int order = 0; order <= orders; ++order)
        k[order] = shared.keys[first / kTile + tile][component][order][lane.index].get();
      float product[orders + 1][4];
      multiply_tiles<orders, true>(q, k, product);
#pragma unroll
      for (int order = 0; order <= orders; ++order) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[i / 2][2 * tile + i % 2][order];
          score = component == 0 ? product[order][i] : score + product[order][i];
        }
      }
    }
  }
  if (biased) {
    const float* const* rows = shared.bias + 2 * kTile * warp + lane.row;
    const float *above = rows[0], *below = rows[kTile];
#pragma unroll
    for (int i = 0; i < 2 * tiles; ++i) {
      const int key = first + kTile * (i / 2) + 2 * lane.column + i % 2;
      const uint32_t place = whole || key < count ? shared.places[key] : 0;
      scores[0][i][0] += above[place];
      scores[1][i][0] += below[place];
    }
  }
  if constexpr (!whole) {
#pragma unroll
    for (int i = 0; i < 2 * tiles; ++i)
      if (first + kTile * (i / 2) + 2 * lane.column + i % 2 >= count) scores[0][i][0] = scores[1][i][0] = -INFINITY;
  }
  float factors[2][orders + 1];
#pragma unroll
  for (int row = 0; row < 2; ++row)
    online_softmax_step<float, orders, 2 * tiles, 4>(scores[row], states[row], factors[row]);
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    Split<4> p[orders + 1];
#pragma unroll
    for (int order = 0; order <= orders; ++order) {
      const int i = 2 * tile;
      p[order] = split<4>({scores[0][i][order], scores[1][i][order], scores[0][i + 1][order], scores[1][i + 1][order]});
    }
#pragma unroll
    for (int component = 0; component < dim / kTile; ++component) {
      Split<2> v[orders + 1];
#pragma unroll
      for (int order = 0; order <= orders; ++order)
        v[order] = shared.values[first / kTile + tile][component][order][lane.index].get();
      float product[orders + 1][4];
      multiply_tiles<orders, false>(p, v, product);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* series = sums[component][i];
#pragma unroll
        for (int order = orders; order >= 0; --order) {
          float sum = product[order][i];
          if (tile > 0) {
            sum += series[order];
          } else {
#pragma unroll
            for (int j = 0; j <= order; ++j) sum += series[j] * factors[i / 2][order - j];
          }
          series[order] = sum;
        }
      }
    }
  }
}

template <int orders, int dim>
__device__ void store_output(const WindowAttentionTaylor<float>& problem, const TensorTile<orders, dim>& shared,
                             RowStates<orders>& states, Sums<orders, dim>& sums) {
  const Lane lane;
  const AttentionWindow& window = shared.window;
  const AttentionStrides strides = output_strides(problem);
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (float& total : states[row].total)
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float* total = states[row].total;
    const int token = shared.first_query() + kTile * row + lane.row;
    if (token >= window.tokens()) continue;
    float* to = problem.output + token_offset(window, strides, token);
    const float inverse = 1.0f / total[0];
#pragma unroll
    for (int i = 0; i < dim / kTile * 2; ++i) {
      const int component = i / 2 * kTile + 2 * lane.column + i % 2;
      if (component >= problem.head_dim) continue;
      float* y = sums[i / 2][2 * row + i % 2];
      divide_series<orders>(y, total, inverse);
#pragma unroll
      for (int order = 0; order <= orders; ++order)
        to[order * strides.order + component] = order == 2 ? 2.0f * y[order] : y[order];
    }
  }
}

template <int orders, int dim>
__global__ void __launch_bounds__(TensorLayout<orders, dim>::kWarps* kWarp, TensorLayout<orders, dim>::kBlocks)
    window_attention_taylor_tensor_kernel(const WindowAttentionTaylor<float> problem, unsigned blocks_per_window) {
  using Layout = TensorLayout<orders, dim>;
  __shared__ TensorTile<orders, dim> shared;

  if (threadIdx.x == 0) {
    shared.window = window_at(problem, blockIdx.x / blocks_per_window);
    shared.first = static_cast<int>(blockIdx.x % blocks_per_window * blockDim.x / 2);
  }
  __syncthreads();
  if (shared.first >= shared.window.tokens()) return;  // the whole block: the edge of the map cuts this window off
  load_queries(problem, shared);
  Sums<orders, dim> sums = {};
  RowStates<orders> own;
  RowStates<orders>& states = Layout::kSharedStates ? shared.states[threadIdx.x] : own;
  for (SoftmaxState<orders, float>& state : states) state = {{kLowest<float>}, {}};
  for (int key = 0; key < shared.window.tokens(); key += Layout::kKeys) {
    const int rest = static_cast<int>(shared.window.tokens()) - key;
    const int count = rest < Layout::kKeys ? rest : Layout::kKeys;
    if (key > 0) __syncthreads();  // all threads are done with the tile before
    load_keys(problem, key, count, shared);
    if (!shared.has_queries()) continue;
    const bool biased = problem.bias != nullptr;
    int i = 0;
    if constexpr (Layout::kStep > 1) {
#pragma unroll 1
      for (; i + Layout::kStep * kTile <= count; i += Layout::kStep * kTile)
        attend_to<orders, dim, Layout::kStep, true>(shared, biased, i, count, states, sums);
    }
#pragma unroll 1
    for (; i < count; i += kTile) attend_to<orders, dim, 1, false>(shared, biased, i, count, states, sums);
  }
  if (shared.has_queries()) store_output(problem, shared, states, sums);
}

template <int orders, int dim>
void launch_tensor_kernel(const WindowAttentionTaylor<float>& problem, cudaStream_t stream) {
  constexpr int kMostWarps = TensorLayout<orders, dim>::kWarps;
  const int64_t tiles = (most_tokens(problem) + 2 * kTile - 1) / (2 * kTile);  // of queries, one for each warp
  const int64_t blocks_per_window = (tiles + kMostWarps - 1) / kMostWarps;
  const int64_t warps = (tiles + blocks_per_window - 1) / blocks_per_window;
  const auto blocks = static_cast<unsigned>(window_count(problem) * blocks_per_window);  // grid.x: up to 2^31 - 1
  launch_kernel(window_attention_taylor_tensor_kernel<orders, dim>, blocks, static_cast<unsigned>(warps * kWarp),
                stream, problem, static_cast<unsigned>(blocks_per_window));
}

}  // namespace
}  // namespace asvit_fast
