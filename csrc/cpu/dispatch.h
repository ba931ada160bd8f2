// The instruction sets (ISAs) that CPU kernels are compiled for, and which of them runs: decided once, here.
#pragma once

#include <string>
#include <vector>

namespace asvit_fast {

enum class Isa { portable, avx2, avx512 };

// One kernel, compiled once per ISA. Entries of an ISA that this build does not have are null.
template <typename Function>
struct PerIsa {
  Function* portable;
  Function* avx2;
  Function* avx512;
};

#ifdef __x86_64__
#define ASVIT_FAST_PER_ISA(function) {portable::function, avx2::function, avx512::function}
#else
#define ASVIT_FAST_PER_ISA(function) {portable::function, nullptr, nullptr}
#endif

Isa active_isa();

template <typename Function>
Function* select(const PerIsa<Function>& kernel) {
  switch (active_isa()) {
    case Isa::avx512:
      return kernel.avx512;
    case Isa::avx2:
      return kernel.avx2;
    default:
      return kernel.portable;
  }
}

// For Python: names as in the environment variable ASVIT_FAST_ISA, which sets the first choice.
std::vector<std::string> compiled_isas();   // in this build
std::vector<std::string> available_isas();  // that this CPU can run, best first
std::string get_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

}  // namespace asvit_fast
