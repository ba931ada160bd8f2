// Patch merging on the CPU: what surrounds the matrix products, on blocks of neighbourhoods. No torch header.
#pragma once

#include <cstdint>

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
  bool differentiate;  // mean and rstd are there already, and rows stay without norm_weight and norm_bias
};

// Elements behind the rows given to a kernel that it may overwrite.
constexpr int64_t kRowSlack = 32;

// Fills rows [end - begin, features] with the normalised neighbourhoods of output tokens. One copy per instruction set.
template <typename T>
using PatchMergeRowsCpu = void(const PatchMerge<T>& problem, int64_t begin, int64_t end, T* rows);

// Turns gradients [end - begin, features] of the outputs of LayerNorm into those of neighbourhoods and adds them to
// `to_tokens`, a gradient of all rows. `rows` are those of PatchMergeRowsCpu; `workspace` has twice features +
// kRowSlack elements.
template <typename T>
using PatchMergeGradientCpu = void(const PatchMerge<T>& problem, int64_t begin, int64_t end, const T* rows,
                                   const T* gradients, T* workspace, T* to_tokens);

// What the gradients of the parameters are made of, and themselves.
template <typename T>
struct PatchMergeParameters {
  int64_t outputs, features;
  const T* weight;                   // [outputs, features]
  const T *norm_weight, *norm_bias;  // [features]; norm_bias or null
  const T* total;                    // sum of the gradient of the output [outputs]
  T* to_weight;                      // [outputs, features]; before, gradient^T x, x the normalised neighbourhoods
  T *to_norm_weight, *to_norm_bias;  // [features]
};

// Features begin <= i < end.
template <typename T>
using PatchMergeParametersCpu = void(const PatchMergeParameters<T>& problem, int64_t begin, int64_t end);

#define ASVIT_FAST_DECLARE_PATCH_MERGE                       \
  PatchMergeRowsCpu<float> patch_merge_rows_f32;             \
  PatchMergeRowsCpu<double> patch_merge_rows_f64;            \
  PatchMergeGradientCpu<float> patch_merge_gradient_f32;     \
  PatchMergeGradientCpu<double> patch_merge_gradient_f64;    \
  PatchMergeParametersCpu<float> patch_merge_parameters_f32; \
  PatchMergeParametersCpu<double> patch_merge_parameters_f64;
namespace portable {
ASVIT_FAST_DECLARE_PATCH_MERGE
}
namespace avx2 {
ASVIT_FAST_DECLARE_PATCH_MERGE
}
namespace avx512 {
ASVIT_FAST_DECLARE_PATCH_MERGE
}
#undef ASVIT_FAST_DECLARE_PATCH_MERGE

}  // namespace asvit_fast
