// Checks, conversions and pointers of an op's tensors, and work cut into parts for threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arena.h"
#include "convert.h"
#include "memory_pool.h"
#include "scalar_type.h"
#include "tensor.h"

namespace asvit_fast {

// ------------------------------------------------------------------------------------------------------------ checks

// `tensor` is read through pointers of x's device, after a conversion of its numbers.
inline void check_device_and_type(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  ASVIT_FAST_CHECK(tensor.device() == x.device(), op, ": ", name, " must be on ", x.device(), ", not on ",
                   tensor.device());
  ASVIT_FAST_CHECK(is_floating(tensor.scalar_type()), op, ": ", name, " must be floating point, not ",
                   tensor.scalar_type());
}

// The same with sizes, for a tensor that may be missing.
inline void check_operand(const char* op, const char* name, const OptionalTensor& tensor, Sizes sizes,
                          const Tensor& x) {
  if (!tensor) return;
  ASVIT_FAST_CHECK(tensor->sizes().equals(sizes), op, ": ", name, " must be ", sizes, ", not ", tensor->sizes());
  check_device_and_type(op, name, *tensor, x);
}

// Sums and products of a few such numbers are below 2^63.
inline bool is_count(int64_t value, int64_t least) {
  return value >= least && value <= std::numeric_limits<int32_t>::max();
}

// Whether these are the zeros around an image: four numbers.
inline bool is_padding(Sizes padding) {
  return padding.size() == 4 &&
         std::all_of(padding.begin(), padding.end(), [](int64_t zeros) { return is_count(zeros, 0); });
}

// How many patches of `span` pixels there are along a side, at distances of `stride`.
inline int64_t patches_along(int64_t size, int64_t padding, int64_t span, int64_t stride) {
  return size + padding < span ? 0 : (size + padding - span) / stride + 1;
}

// Whether windows of a map with so many axes may be cut after this shift.
inline bool is_window(Sizes window, Sizes shift, size_t axes) {
  if (window.size() != axes || shift.size() != axes) return false;
  for (size_t i = 0; i < axes; ++i)
    if (!is_count(window[i], 1) || shift[i] < 0 || shift[i] >= window[i]) return false;
  return true;
}

// ------------------------------------------------------------------------------------------------------------- types

inline ScalarType scalar_type(const char* op, Dtype type) {
  ASVIT_FAST_CHECK(is_floating(type), op, ": no kernel for ", type);
  if (type == kFloat) return ScalarType::float32;
  if (type == kDouble) return ScalarType::float64;
  return type == kHalf ? ScalarType::float16 : ScalarType::bfloat16;
}

// Half precision is computed in single precision.
inline Dtype compute_type(Dtype type) { return type == kHalf || type == kBFloat16 ? kFloat : type; }

// Calls run(T()) with the type T that numbers of `type` are computed in: float or double.
template <typename Run>
void with_compute_type(const char* op, Dtype type, Run run) {
  with_type<float, float>(scalar_type(op, type), run);
}

// ---------------------------------------------------------------------------------------------------------- pointers

// `vector` as the kernels want it: contiguous, of the given type; none for none.
inline OptionalTensor parameters(const OptionalTensor& vector, Dtype type) {
  if (!vector) return std::nullopt;
  return as_contiguous(as_type(*vector, type));
}

template <typename T>
const T* pointer_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
T* mutable_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// ------------------------------------------------------------------------------------------ types, in any thread
//
// torch's ops may only run in the calling thread: others do not have its settings, such as that nothing is recorded.

template <typename T>
constexpr Dtype kTypeOf = sizeof(T) == sizeof(float) ? kFloat : kDouble;

// A matrix whose rows are contiguous as numbers of type T: itself, or a contiguous copy.
template <typename T>
Tensor widened(const Tensor& matrix) {
  const Dtype dtype = matrix.scalar_type();
  if (dtype == kTypeOf<T>) return matrix;
  const int64_t rows = matrix.size(0), columns = matrix.size(1), stride = matrix.stride(0) * bytes_of(dtype);
  const Tensor wide = new_empty({rows, columns}, kTypeOf<T>);
  const auto* const from = static_cast<const char*>(matrix.const_data_ptr());
  T* const to = wide.mutable_data_ptr<T>();
  const ScalarType type = scalar_type("widened", dtype);
  const auto kernel = ASVIT_FAST_SELECT(widen<T>);
  for (int64_t row = 0; row < rows; ++row) kernel(from + row * stride, type, columns, to + row * columns);
  return wide;
}

// Writes the numbers of `from`, of type T or to's type, to `to`; both are contiguous.
template <typename T>
void assign(const Tensor& to, const Tensor& from) {
  const Dtype type = to.scalar_type();
  const int64_t count = to.numel();
  if (from.scalar_type() == type) {
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), static_cast<size_t>(count) * bytes_of(type));
  } else {
    ASVIT_FAST_SELECT(round_to<T>)(from.const_data_ptr<T>(), count, scalar_type("assign", type), to.mutable_data_ptr());
  }
}

// ----------------------------------------------------------------------------------------------------------- threads

// What a thread should have to do at least: below, waking it costs more than it saves.
constexpr double kElements = 1 << 13;
constexpr double kMultiplyAdds = 1 << 18;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

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
  parallel_for(0, count, grain_size(kMultiplyAdds, work), [&](int64_t begin, int64_t end) {
    const Tensor bytes = empty({arena.used()}, kByte);
    run(begin, end, static_cast<char*>(bytes.mutable_data_ptr()));
  });
}

}  // namespace asvit_fast
