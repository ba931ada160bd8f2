// What the Taylor ops ask of a stacked tensor [orders + 1, ...], and its element type without torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "scalar_type.h"
#include "taylor_matrix.h"

namespace asvit_fast {

// The number of orders of x, checked.
inline int taylor_orders(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) >= 1 && x.size(0) <= 3, op,
                    ": x must be [orders + 1, ...] with 0 to 2 orders, not ", x.sizes());
  return static_cast<int>(x.size(0)) - 1;
}

inline void check_rows(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) >= 1, op, ": x must be [orders + 1, ..., C] with C >= 1, not ",
                    x.sizes());
}

// What comes with x is read through pointers of x's device, after a conversion of its numbers.
inline void check_companion(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " must be on ", x.device(), ", not on ",
                    tensor.device());
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), op, ": ", name, " must be floating point, not ",
                   tensor.scalar_type());
}

// The same with sizes, for a tensor that may be missing.
inline void check_operand(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                          at::IntArrayRef sizes, const at::Tensor& x) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->sizes() == sizes, op, ": ", name, " must be ", sizes, ", not ", tensor->sizes());
  check_companion(op, name, *tensor, x);
}

// A vector of parameters, one per channel, or none.
inline void check_channels(const char* op, const char* name, const std::optional<at::Tensor>& vector,
                           const at::Tensor& x) {
  if (!vector) return;
  TORCH_CHECK_VALUE(x.dim() >= 2 && vector->dim() == 1 && vector->size(0) == x.size(-1), op, ": ", name,
                    " must be [C] for x [orders + 1, ..., C] ", x.sizes(), ", not ", vector->sizes());
  check_companion(op, name, *vector, x);
}

// Sums and products of a few such numbers are below 2^63.
inline bool is_count(int64_t value, int64_t least) {
  return value >= least && value <= std::numeric_limits<int32_t>::max();
}

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

// Half precision is computed in single precision.
inline at::ScalarType compute_type(at::ScalarType type) { return is_half(type) ? at::kFloat : type; }

// `vector` as the kernels want it: contiguous, of the given type; undefined for none.
inline at::Tensor parameters(const std::optional<at::Tensor>& vector, at::ScalarType type) {
  return vector ? vector->to(type).contiguous() : at::Tensor();
}

template <typename T>
const T* pointer_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// input, output: [orders + 1, ..., size], contiguous
inline TaylorMatrix<void> stacked_matrix(const at::Tensor& input, const at::Tensor& output) {
  const int64_t size = input.size(-1), stack = input.size(0);
  return {input.const_data_ptr(), output.mutable_data_ptr(), input.numel() / (stack * size), size,
          static_cast<int>(stack) - 1};
}

template <typename T>
TaylorMatrix<T> stacked_matrix(const at::Tensor& input, const at::Tensor& output) {
  const TaylorMatrix<void> matrix = stacked_matrix(input, output);
  return {input.const_data_ptr<T>(), output.mutable_data_ptr<T>(), matrix.count, matrix.size, matrix.orders};
}

// Rows that a thread should have at least; below, waking it costs more than it saves.
inline int64_t rows_per_thread(int64_t size) { return std::max<int64_t>(1, (1 << 13) / size); }

inline ScalarType scalar_type(const char* op, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ScalarType::float32;
    case at::kDouble:
      return ScalarType::float64;
    case at::kHalf:
      return ScalarType::float16;
    case at::kBFloat16:
      return ScalarType::bfloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": no kernel for ", type);
  }
}

}  // namespace asvit_fast
