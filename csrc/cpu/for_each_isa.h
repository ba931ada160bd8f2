// Kernels that are compiled once per instruction set (ISA): their declarations, and the choice between them.
#pragma once

namespace asvit_fast {

enum class Isa { portable, avx2, avx512, avx512bf16 };  // the last has products of bfloat16 numbers

Isa active_isa();
bool runs(Isa isa);  // whether this processor has it

// Declares template <typename T> void function(parameters) in the namespace of each ISA. It is compiled for each of
// them: see cpu/compile_for_isa.h.
#define ASVIT_FAST_FOR_EACH_ISA(function, ...) \
  namespace portable {                         \
  template <typename T>                        \
  void function(__VA_ARGS__);                  \
  }                                            \
  namespace avx2 {                             \
  template <typename T>                        \
  void function(__VA_ARGS__);                  \
  }                                            \
  namespace avx512 {                           \
  template <typename T>                        \
  void function(__VA_ARGS__);                  \
  }                                            \
  namespace avx512bf16 {                       \
  template <typename T>                        \
  void function(__VA_ARGS__);                  \
  }

// The function of that name which is compiled for the active ISA.
#ifdef __x86_64__
#define ASVIT_FAST_SELECT(...) \
  select_isa(portable::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__, avx512bf16::__VA_ARGS__)
#else
#define ASVIT_FAST_SELECT(...) (&portable::__VA_ARGS__)
#endif

template <typename Function>
Function* select_isa(Function* portable, Function* avx2, Function* avx512, Function* avx512bf16) {
  switch (active_isa()) {
    case Isa::avx512bf16:
      return avx512bf16;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return portable;
  }
}

}  // namespace asvit_fast
