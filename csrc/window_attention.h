// Windowed attention of values: its forward pass is order 0 of window_attention_taylor, which it shares windows and
// operands with; what is here is the backward pass on the CPU. No torch header.
#pragma once

#include "window_attention_taylor.h"

namespace asvit_fast {

template <typename T>
struct WindowAttentionBackward {
  WindowAttentionTaylor<T> forward;  // of order 0, with its output and statistics
  AttentionOperand<T> gradient;      // of the output
  T *to_q, *to_k, *to_v;             // gradients, written whole
  AttentionStrides to_strides;       // of all three
  T* to_bias;      // [pieces, heads, tokens, tokens], zeros; the gradient is the sum over pieces. Or null
  int64_t pieces;  // that the windows of each head are cut into, whatever the number of threads: sums in a fixed order
};

// The tasks begin <= i < end of heads * pieces, with AttentionBackwardWorkspace::total() elements of memory, aligned to
// 64 bytes, to itself. One copy per instruction set.
template <typename T>
using WindowAttentionBackwardCpu = void(const WindowAttentionBackward<T>& problem, int64_t begin, int64_t end,
                                        T* workspace);

namespace portable {
WindowAttentionBackwardCpu<float> window_attention_backward_f32;
WindowAttentionBackwardCpu<double> window_attention_backward_f64;
}  // namespace portable
namespace avx2 {
WindowAttentionBackwardCpu<float> window_attention_backward_f32;
WindowAttentionBackwardCpu<double> window_attention_backward_f64;
}  // namespace avx2
namespace avx512 {
WindowAttentionBackwardCpu<float> window_attention_backward_f32;
WindowAttentionBackwardCpu<double> window_attention_backward_f64;
}  // namespace avx512

namespace {  // one copy per including file, as in window_attention_taylor.h

// Queries that go through the keys together, at most.
constexpr int64_t kMaximumQueryGroup = 32;

// Memory of one CPU thread, in elements: operands of one window and sums of its gradients, and of a group of queries.
struct AttentionBackwardWorkspace {
  int64_t padded_dim, packed, rows, sums, group;

  template <typename T>
  explicit AttentionBackwardWorkspace(const WindowAttentionTaylor<T>& problem) {
    const AttentionWorkspace sizes(problem);
    padded_dim = sizes.padded_dim;
    packed = sizes.keys;                            // keys, values
    rows = (sizes.values + 15) / 16 * 16;           // keys, queries, gradients of the output
    sums = packed / problem.head_dim * padded_dim;  // gradients of keys, values
    group = kMaximumQueryGroup * padded_dim;        // queries, gradients of the output, gradients of queries
  }

  int64_t total() const { return 2 * packed + 3 * rows + 2 * sums + 3 * group; }
};

}  // namespace
}  // namespace asvit_fast
