// 16-byte vectors: SSE2 on x86-64, NEON on ARM, whatever the compiler makes of them elsewhere.
#define ASVIT_FAST_VECTOR_BYTES 16
#include "cpu/softmax_taylor_kernel.h"

namespace asvit_fast::portable {
ASVIT_FAST_SOFTMAX_TAYLOR_KERNELS
}
