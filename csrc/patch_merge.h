// Patch merging on the CPU: what surrounds the matrix products, on blocks of neighbourhoods. No torch header.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"

namespace asvit_fast {

// Where K x K neighbourhoods lie on a zero-padded map, and the order of their features.
struct Neighbourhoods {
  int64_t height, width, channels;
  int64_t kernel, stride;
  int64_t top, left;  // zeros before
  int64_t out_height, out_width;
  bool channels_last;  // features ordered (column, row, channel), else (channel, row, column)

  int64_t features() const { return kernel * kernel * channels; }
};

// Rows of all images are counted through: row h of image b is b * height + h, and output rows likewise; output tokens
// are counted along the output rows.
template <typename T>
struct PatchMerge {
  Neighbourhoods map;
  const T* tokens;                   // [rows, width, channels] from `first_row` on
  int64_t first_row;                 // of the input
  const T *norm_weight, *norm_bias;  // [features] or null
  T eps;
  T *mean, *rstd;      // [output tokens]
  bool differentiate;  // mean and rstd are given, and rows stay without norm_weight and norm_bias
};

// Elements behind the rows given to a kernel that it may overwrite.
constexpr int64_t kRowSlack = 32;

// What the gradients of the parameters are made of, and themselves.
template <typename T>
struct PatchMergeParameters {
  int64_t outputs, features;
  const T* weight;                       // [outputs, features]
  const T *norm_weight, *norm_bias;      // [features]; norm_bias or null
  const T* total;                        // sum of the gradient of the output [outputs]
  T* grad_weight;                        // [outputs, features]; before, gradient^T x, x the normalised neighbourhoods
  T *grad_norm_weight, *grad_norm_bias;  // [features]
};

// patch_merge_rows: fills rows [end - begin, features] with the normalised neighbourhoods of output tokens.
//
// patch_merge_gradient: maps gradients [end - begin, features] of the outputs of LayerNorm to those of
// neighbourhoods and adds them to `grad_tokens`, a gradient of all rows. `rows` are those of patch_merge_rows;
// `workspace` has twice features + kRowSlack elements.
//
// patch_merge_parameters: the features begin <= i < end.
ASVIT_FAST_FOR_EACH_ISA(patch_merge_rows, const PatchMerge<T>& problem, int64_t begin, int64_t end, T* rows)
ASVIT_FAST_FOR_EACH_ISA(patch_merge_gradient, const PatchMerge<T>& problem, int64_t begin, int64_t end, const T* rows,
                        const T* gradients, T* workspace, T* grad_tokens)
ASVIT_FAST_FOR_EACH_ISA(patch_merge_parameters, const PatchMergeParameters<T>& problem, int64_t begin, int64_t end)

}  // namespace asvit_fast
