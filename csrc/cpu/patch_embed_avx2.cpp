// AVX2 with FMA: 32-byte vectors.
#ifdef __x86_64__
#include <cstdint>
#include <cstring>

#include "patch_embed.h"

// Only what follows is compiled for this instruction set; headers with inline functions belong above.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ASVIT_FAST_VECTOR_BYTES 32
#include "cpu/patch_embed_backward_kernel.h"

namespace asvit_fast::avx2 {
ASVIT_FAST_PATCH_EMBED_KERNELS
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif  // __x86_64__
