// What the Taylor ops ask of a stack x [orders + 1, ...], and how they run on it.
#pragma once

#include "taylor_matrix.h"
#include "tensor_utils.h"

#ifdef ASVIT_FAST_CUDA
#include <cuda_runtime_api.h>

#pragma weak aoti_torch_get_current_cuda_stream  // which a torch without CUDA lacks, and never needs
#endif

namespace asvit_fast {

inline void check_orders(const char* op, const Tensor& x) {
  ASVIT_FAST_CHECK(x.dim() >= 1 && x.size(0) >= 1 && x.size(0) <= 3, op,
                   ": x must be [orders + 1, ...] with 0 to 2 orders, not ", x.sizes());
}

inline void check_rows(const char* op, const Tensor& x) {
  check_orders(op, x);
  ASVIT_FAST_CHECK(x.dim() >= 2 && x.size(-1) >= 1, op, ": x must be [orders + 1, ..., C] with C >= 1, not ",
                   x.sizes());
}

// A vector of parameters, one per channel, or none.
inline void check_channels(const char* op, const char* name, const OptionalTensor& vector, const Tensor& x) {
  if (!vector) return;
  ASVIT_FAST_CHECK(x.dim() >= 2 && vector->dim() == 1 && vector->size(0) == x.size(-1), op, ": ", name,
                   " must be [C] for x [orders + 1, ..., C] ", x.sizes(), ", not ", vector->sizes());
  check_device_and_type(op, name, *vector, x);
}

// input, output: [orders + 1, ..., size], contiguous, of the type T or, for void, of any type
template <typename T>
TaylorMatrix<T> taylor_matrix(const Tensor& input, const Tensor& output) {
  const int64_t size = input.size(-1), stack = input.size(0);
  return {static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(output.mutable_data_ptr()),
          input.numel() / (stack * size), size, static_cast<int>(stack) - 1};
}

// The output that run(T(), input, output) writes on the CPU, for x and in its type; it is computed in the type T.
template <typename Run>
Tensor run_taylor_cpu(const char* op, const Tensor& x, Run run) {
  const Dtype type = x.scalar_type(), computed = compute_type(type);
  const Tensor input = as_contiguous(as_type(x, computed)), output = new_empty(input.sizes(), computed);
  with_compute_type(op, computed, [&](auto zero) { run(zero, input, output); });
  return as_type(output, type);
}

#ifdef ASVIT_FAST_CUDA
// Calls launch(stream) on x's device.
template <typename Launch>
void launch_cuda(const Tensor& x, Launch launch) {
  if (x.numel() == 0) return;  // a grid of no blocks is an invalid launch
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  launch(stream);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(text_of("CUDA error: ", cudaGetErrorString(error)));
}

// The output that the kernel which launch(input, output, type, stream) starts writes for x.
template <typename Launch>
Tensor run_taylor_cuda(const char* op, const Tensor& x, Launch launch) {
  const ScalarType type = scalar_type(op, x.scalar_type());
  const Tensor input = as_contiguous(x), output = empty(x.sizes(), x.scalar_type(), x.device());
  launch_cuda(x, [&](void* stream) { launch(input, output, type, stream); });
  return output;
}
#endif

}  // namespace asvit_fast
