// Patch embedding on the CPU: convolution, bias and LayerNorm over the channels, channels last, and its backward pass.
// No torch header.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/for_each_isa.h"

namespace asvit_fast {

// Distances between neighbours along each dimension of the image [batch, in_channels, height, width], in elements.
struct ImageStrides {
  int64_t batch, channel, row, column;
};

// Vectors of channels have this many elements, zeros behind the last channel: whole vectors of every instruction set.
constexpr int64_t kChannelBlock = 16;

template <typename T>
struct PatchEmbed {
  const T* image;
  ImageStrides strides;
  int64_t batch, in_channels, height, width;
  int64_t kernel, stride, dilation, left, top;  // left, top: zeros before the image
  int64_t rows, columns, channels;              // of the output
  const T* weight;                              // [in_channels, kernel, kernel, padded channels]
  const T* bias;                                // [padded channels]
  const T *norm_weight, *norm_bias;             // [padded channels]; or null: no LayerNorm
  T eps;

  int64_t padded() const { return (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock; }
  int64_t image_rows() const { return in_channels * kernel; }  // that the patches of one row of tokens have
  int64_t patch() const { return image_rows() * kernel; }
};

template <typename T>
struct PatchEmbedBackward {
  PatchEmbed<T> forward;
  const T* gradient;     // of the output, [batch, rows, columns, channels]
  const T* conv_output;  // same shape; or null: it is computed again, if it is needed
  T* grad_conv_output;   // same shape; or null
  T* sums;         // [pieces, patch + 3, padded channels], zeros: gradients of the weight, the bias, the norm's weight
                   // and bias; the gradient is the sum over pieces. Or null
  int64_t pieces;  // that the rows of tokens are cut into, whatever the number of threads: sums in a fixed order
};

// Forward: output and, unless null, the convolution's output [batch, rows, columns, channels] of the tokens' rows begin
// <= i < end of batch * rows. Backward: the pieces begin <= i < end. Both with the memory of a
// PatchEmbedMemory, aligned to 64 bytes, to themselves.
ASVIT_FAST_FOR_EACH_ISA(patch_embed, const PatchEmbed<T>& problem, T* output, T* conv_output, int64_t begin,
                        int64_t end, char* memory)
ASVIT_FAST_FOR_EACH_ISA(patch_embed_backward, const PatchEmbedBackward<T>& problem, int64_t begin, int64_t end,
                        char* memory)

namespace {  // one copy per including file: nothing compiled for one instruction set may be linked into another

constexpr int64_t kMaximumTokenBlock = 14;  // tokens whose channels are summed together, at most

// Memory of one CPU thread.
template <typename T>
struct PatchEmbedMemory {
  int64_t row;          // elements of one row of the padded image, as far as blocks of tokens reach
  T* pixels;            // [in_channels, kernel, row]
  T* block;             // [tokens of a block, padded channels]
  T* tokens = nullptr;  // [columns, padded channels] as far as blocks reach, for the backward pass

  PatchEmbedMemory(const PatchEmbed<T>& problem, Arena& arena) {
    const int64_t columns = problem.columns + kMaximumTokenBlock - 1;
    row = ((columns - 1) * problem.stride + (problem.kernel - 1) * problem.dilation + 16) / 16 * 16;
    pixels = arena.take<T>(problem.image_rows() * row);
    block = arena.take<T>(kMaximumTokenBlock * problem.padded());
  }

  PatchEmbedMemory(const PatchEmbedBackward<T>& problem, Arena& arena) : PatchEmbedMemory(problem.forward, arena) {
    tokens = arena.take<T>((problem.forward.columns + kMaximumTokenBlock - 1) * problem.forward.padded());
  }
};

}  // namespace
}  // namespace asvit_fast
