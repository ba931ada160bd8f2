// Memory for large tensors that outlives them: fresh memory costs a page fault for every 4096 bytes of it, which takes
// longer than most kernels take to fill them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace asvit_fast {

// at::empty. On the CPU tensors of a mebibyte and more come from memory that earlier ones left, in huge pages where the
// system has them; up to `pool_limit` bytes are kept.
at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

void set_pool_limit(int64_t bytes);  // frees what is above
int64_t pool_limit();
int64_t pool_size();  // bytes that are kept now

}  // namespace asvit_fast
