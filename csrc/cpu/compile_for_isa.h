// One family of kernels for one instruction set: the whole of a translation unit that setup.py makes, which defines
//   ASVIT_FAST_ISA           the namespace of the kernels: portable, avx2, avx512 or avx512bf16
//   ASVIT_FAST_VECTOR_BYTES  16 (SSE2 on x86-64, NEON on ARM, whatever the compiler makes of them elsewhere), 32 or 64
//   ASVIT_FAST_BF16_DOT      1 where there are products of bfloat16 numbers, else 0
//   ASVIT_FAST_INTERFACE     the header that declares the kernels
//   ASVIT_FAST_KERNELS       the header that defines them
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && ASVIT_FAST_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#if ASVIT_FAST_BF16_DOT
#define ASVIT_FAST_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma"
#elif ASVIT_FAST_VECTOR_BYTES == 64
#define ASVIT_FAST_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma"
#else
#define ASVIT_FAST_TARGET "avx2,f16c,fma"
#endif

#include ASVIT_FAST_INTERFACE

// Only what follows is compiled for the instruction set; headers with inline functions belong above.
#if ASVIT_FAST_VECTOR_BYTES == 16
#include ASVIT_FAST_KERNELS
#elif defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target(ASVIT_FAST_TARGET))), apply_to = function)
#else
#define ASVIT_FAST_PRAGMA(text) _Pragma(#text)
#define ASVIT_FAST_GCC_TARGET(names) ASVIT_FAST_PRAGMA(GCC target(names))
ASVIT_FAST_GCC_TARGET(ASVIT_FAST_TARGET)
#endif
#include ASVIT_FAST_KERNELS
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
