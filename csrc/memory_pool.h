// Memory for large tensors that outlives them: fresh memory costs a page fault for every 4096 bytes of it, which takes
// longer than most kernels take to fill them.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace asvit_fast {

// `empty` on the CPU. Tensors of a mebibyte and more come from memory that earlier ones left, in huge pages where the
// system has them; up to `pool_limit` bytes are kept. Their storage cannot grow, and torch's profiler does not see it:
// with a limit of 0 all memory is torch's own.
Tensor new_empty(Sizes sizes, Dtype type);

void set_pool_limit(int64_t bytes);  // frees what is above
int64_t pool_limit();
int64_t pool_size();     // bytes that are kept now
int64_t free_pool();     // frees all of them, and says how many they were
int64_t memory_share();  // the limit that the environment asks for, of the machine's or container's memory

}  // namespace asvit_fast
