// 16-byte vectors: SSE2 on x86-64, NEON on ARM, whatever the compiler makes of them elsewhere.
#define ASVIT_FAST_VECTOR_BYTES 16
#include "cpu/patch_embed_backward_kernel.h"

namespace asvit_fast::portable {
ASVIT_FAST_PATCH_EMBED_KERNELS
}
