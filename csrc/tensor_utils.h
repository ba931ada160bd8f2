// Checks, conversions and pointers of an op's tensors, and work cut into parts for threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "arena.h"
#include "memory_pool.h"
#include "scalar_type.h"

namespace asvit_fast {

using OptionalTensor = std::optional<at::Tensor>;

// ------------------------------------------------------------------------------------------------------------ checks

// `tensor` is read through pointers of x's device, after a conversion of its numbers.
inline void check_device_and_type(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " must be on ", x.device(), ", not on ",
                    tensor.device());
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), op, ": ", name, " must be floating point, not ",
                   tensor.scalar_type());
}

// The same with sizes, for a tensor that may be missing.
inline void check_operand(const char* op, const char* name, const OptionalTensor& tensor, at::IntArrayRef sizes,
                          const at::Tensor& x) {
  if (!tensor) return;
  TORCH_CHECK_VALUE(tensor->sizes() == sizes, op, ": ", name, " must be ", sizes, ", not ", tensor->sizes());
  check_device_and_type(op, name, *tensor, x);
}

// Sums and products of a few such numbers are below 2^63.
inline bool is_count(int64_t value, int64_t least) {
  return value >= least && value <= std::numeric_limits<int32_t>::max();
}

// Whether these are the zeros around an image: four numbers.
inline bool is_padding(at::IntArrayRef padding) {
  return padding.size() == 4 &&
         std::all_of(padding.begin(), padding.end(), [](int64_t zeros) { return is_count(zeros, 0); });
}

// How many patches of `span` pixels there are along a side, at distances of `stride`.
inline int64_t patches_along(int64_t size, int64_t padding, int64_t span, int64_t stride) {
  return size + padding < span ? 0 : (size + padding - span) / stride + 1;
}

// Whether windows of a map with so many axes may be cut after this shift.
inline bool is_window(at::IntArrayRef window, at::IntArrayRef shift, size_t axes) {
  if (window.size() != axes || shift.size() != axes) return false;
  for (size_t i = 0; i < axes; ++i)
    if (!is_count(window[i], 1) || shift[i] < 0 || shift[i] >= window[i]) return false;
  return true;
}

// ------------------------------------------------------------------------------------------------------------- types

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

// Half precision is computed in single precision.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

// Calls run(T()) with the type T that numbers of `type` are computed in: float or double.
template <typename Run>
void with_compute_type(const char* op, at::ScalarType type, Run run) {
  with_type<float, float>(scalar_type(op, type), run);
}

// ---------------------------------------------------------------------------------------------------------- pointers

// `vector` as the kernels want it: contiguous, of the given type; undefined for none.
inline at::Tensor parameters(const OptionalTensor& vector, at::ScalarType type) {
  return vector ? vector->to(type).contiguous() : at::Tensor();
}

template <typename T>
const T* pointer_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

template <typename T>
T* mutable_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// ----------------------------------------------------------------------------------------------------------- threads

// What a thread should have to do at least: below, waking it costs more than it saves.
constexpr double kElements = 1 << 13;
constexpr double kMultiplyAdds = 1 << 18;

// The number of tasks, of `work` elements or multiply-adds each, that come to `least` together.
inline int64_t grain_size(double least, double work) {
  return std::max<int64_t>(1, static_cast<int64_t>(least / std::max(work, 1.)));
}

// Calls run(begin, end, memory) on parts of 0 <= i < count tasks of `work` multiply-adds each; a part has the memory of
// a Memory(problem, arena), aligned to 64 bytes, to itself.
template <typename Memory, typename Problem, typename Run>
void parallel_with_memory(const Problem& problem, int64_t count, double work, Run run) {
  Arena arena(nullptr);
  const Memory memory(problem, arena);
  at::parallel_for(0, count, grain_size(kMultiplyAdds, work), [&](int64_t begin, int64_t end) {
    const at::Tensor bytes = at::empty({arena.used()}, at::kByte);
    run(begin, end, static_cast<char*>(bytes.mutable_data_ptr()));
  });
}

}  // namespace asvit_fast
