// What the Taylor ops ask of a stack x [orders + 1, ...], and how they run on it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include "taylor_matrix.h"
#include "tensor_utils.h"

#ifdef ASVIT_FAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace asvit_fast {

inline void check_orders(const char* op, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) >= 1 && x.size(0) <= 3, op,
                    ": x must be [orders + 1, ...] with 0 to 2 orders, not ", x.sizes());
}

inline void check_rows(const char* op, const at::Tensor& x) {
  check_orders(op, x);
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) >= 1, op, ": x must be [orders + 1, ..., C] with C >= 1, not ",
                    x.sizes());
}

// A vector of parameters, one per channel, or none.
inline void check_channels(const char* op, const char* name, const OptionalTensor& vector, const at::Tensor& x) {
  if (!vector) return;
  TORCH_CHECK_VALUE(x.dim() >= 2 && vector->dim() == 1 && vector->size(0) == x.size(-1), op, ": ", name,
                    " must be [C] for x [orders + 1, ..., C] ", x.sizes(), ", not ", vector->sizes());
  check_device_and_type(op, name, *vector, x);
}

// input, output: [orders + 1, ..., size], contiguous, of the type T or, for void, of any type
template <typename T>
TaylorMatrix<T> taylor_matrix(const at::Tensor& input, const at::Tensor& output) {
  const int64_t size = input.size(-1), stack = input.size(0);
  return {static_cast<const T*>(input.const_data_ptr()), static_cast<T*>(output.mutable_data_ptr()),
          input.numel() / (stack * size), size, static_cast<int>(stack) - 1};
}

// The output that run(T(), input, output) writes on the CPU, for x and in its type; it is computed in the type T.
template <typename Run>
at::Tensor run_taylor_cpu(const char* op, const at::Tensor& x, Run run) {
  at::Tensor output;
  with_compute_type(op, x.scalar_type(), [&](auto zero) {
    const at::Tensor input = x.to(compute_type(x.scalar_type())).contiguous();
    output = new_empty(input.sizes(), input.options());
    run(zero, input, output);
  });
  return output.to(x.scalar_type());
}

#ifdef ASVIT_FAST_CUDA
// Calls launch(stream) on x's device.
template <typename Launch>
void launch_cuda(const at::Tensor& x, Launch launch) {
  if (x.numel() == 0) return;  // a grid of no blocks is an invalid launch
  const c10::cuda::CUDAGuard guard(x.device());
  launch(c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The output that the kernel which launch(input, output, type, stream) starts writes for x.
template <typename Launch>
at::Tensor run_taylor_cuda(const char* op, const at::Tensor& x, Launch launch) {
  const ScalarType type = scalar_type(op, x.scalar_type());
  const at::Tensor input = x.contiguous(), output = at::empty_like(input);
  launch_cuda(x, [&](void* stream) { launch(input, output, type, stream); });
  return output;
}
#endif

}  // namespace asvit_fast
