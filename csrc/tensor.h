// Tensors through torch's stable ABI, in short words: C functions and headers that every torch from 2.11 on has, so
// that one build runs with all of them. Only what includes this file knows torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace asvit_fast {

using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Device = torch::stable::Device;
using Dtype = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // borrowed
using OwnedSizes = std::vector<int64_t>;

constexpr Dtype kFloat = Dtype::Float, kDouble = Dtype::Double, kHalf = Dtype::Half, kBFloat16 = Dtype::BFloat16;
constexpr Dtype kByte = Dtype::Byte, kLong = Dtype::Long;

// ------------------------------------------------------------------------------------------------------------ checks

template <typename Part>
void write_part(std::ostream& text, const Part& part) {
  if constexpr (std::is_convertible_v<const Part&, Sizes> && !std::is_arithmetic_v<Part>) {
    const char* before = "[";
    for (const int64_t size : Sizes(part)) {
      text << before << size;
      before = ", ";
    }
    text << (*before == '[' ? "[]" : "]");
  } else if constexpr (std::is_same_v<Part, Device>) {
    text << (part.is_cpu() ? "cpu" : part.is_cuda() ? "cuda" : "another device");
    if (part.is_cuda()) text << ':' << part.index();
  } else {
    text << part;
  }
}

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (write_part(text, parts), ...);
  return text.str();
}

// Python sees a ValueError with the text of the parts, which are looked at in that case only.
#define ASVIT_FAST_CHECK(condition, ...)                                 \
  do {                                                                   \
    if (!(condition)) throw std::invalid_argument(text_of(__VA_ARGS__)); \
  } while (false)

// ------------------------------------------------------------------------------------------------------ what they are

inline bool is_floating(Dtype type) { return type == kFloat || type == kDouble || type == kHalf || type == kBFloat16; }

inline int32_t code_of(Dtype type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

inline size_t bytes_of(Dtype type) { return aoti_torch_dtype_element_size(code_of(type)); }

inline int64_t product(Sizes sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return count;
}

inline OwnedSizes contiguous_strides(Sizes sizes) {
  OwnedSizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return strides;
}

// ------------------------------------------------------------------------------------------------------- new tensors

// In torch's words, by which memory errors are known.
[[noreturn]] inline void throw_no_memory(size_t bytes) {
  throw std::runtime_error(text_of("asvit_fast: can't allocate memory: ", bytes, " bytes"));
}

inline Tensor empty(Sizes sizes, Dtype type, const Device& device = Device(torch::headeronly::DeviceType::CPU)) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const OwnedSizes strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  const auto failed =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code_of(type),
                               to<int32_t>(from(device.type())), device.index(), &handle);
  if (failed) throw_no_memory(static_cast<size_t>(product(sizes)) * bytes_of(type));
  return Tensor(handle);
}

// On the CPU.
inline Tensor zeros(Sizes sizes, Dtype type) {
  Tensor tensor = empty(sizes, type);
  const size_t bytes = static_cast<size_t>(tensor.numel()) * bytes_of(type);
  if (bytes > 0) std::memset(tensor.mutable_data_ptr(), 0, bytes);  // of nothing there is no address
  return tensor;
}

// The tensor itself where it has the type.
inline Tensor as_type(const Tensor& tensor, Dtype type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of one type or another.
inline void copy_to(const Tensor& to, const Tensor& from) {
  Tensor target = to;
  torch::stable::copy_(target, from);
}

// Of [pieces, ...], over the pieces.
inline Tensor sum_first(const Tensor& tensor) {
  const int64_t first = 0;
  return torch::stable::sum(tensor, Sizes(first));
}

// A view, which autograd knows nothing of, with the distances and the first element given in elements.
inline Tensor strided(const Tensor& tensor, Sizes sizes, Sizes strides, int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

// Of a contiguous tensor.
inline Tensor reshaped(const Tensor& tensor, Sizes sizes, int64_t offset = 0) {
  return strided(tensor, sizes, contiguous_strides(sizes), offset);
}

// Of a matrix.
inline Tensor transposed(const Tensor& matrix) {
  return strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// `count` rows or columns of a matrix.
inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  return strided(matrix, {count, matrix.size(1)}, matrix.strides(), first * matrix.stride(0));
}

inline Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  return strided(matrix, {matrix.size(0), count}, matrix.strides(), first * matrix.stride(1));
}

}  // namespace asvit_fast
