// One family of kernels for one instruction set: the whole of a translation unit that setup.py makes, which defines
//   ASVIT_FAST_ISA           the namespace of the kernels: portable, avx2 or avx512
//   ASVIT_FAST_VECTOR_BYTES  16 (SSE2 on x86-64, NEON on ARM, whatever the compiler makes of them elsewhere), 32 or 64
//   ASVIT_FAST_INTERFACE     the header that declares the kernels
//   ASVIT_FAST_KERNELS       the header that defines them
#include <cstdint>
#include <cstring>

#include ASVIT_FAST_INTERFACE

// Only what follows is compiled for the instruction set; headers with inline functions belong above.
#if ASVIT_FAST_VECTOR_BYTES == 16
#include ASVIT_FAST_KERNELS
#elif defined(__x86_64__)
#if defined(__clang__) && ASVIT_FAST_VECTOR_BYTES == 64
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma"))), \
                             apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#elif ASVIT_FAST_VECTOR_BYTES == 64
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma")
#else
#pragma GCC target("avx2,f16c,fma")
#endif
#include ASVIT_FAST_KERNELS
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
