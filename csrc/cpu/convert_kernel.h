// Numbers of one type as those of another, for one instruction set.
#pragma once

#include "cpu/half_precision.h"

namespace asvit_fast {
namespace ASVIT_FAST_ISA {

template <typename T>
void widen(const void* from, ScalarType type, int64_t count, T* to) {
  with_type<Float16, BFloat16>(
      type, [&](auto number) { convert_row(static_cast<const decltype(number)*>(from), count, to); });
}

template <typename T>
void round_to(const T* from, int64_t count, ScalarType type, void* to) {
  with_type<Float16, BFloat16>(type,
                               [&](auto number) { convert_row(from, count, static_cast<decltype(number)*>(to)); });
}

template void widen(const void*, ScalarType, int64_t, float*);
template void widen(const void*, ScalarType, int64_t, double*);
template void round_to(const float*, int64_t, ScalarType, void*);
template void round_to(const double*, int64_t, ScalarType, void*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
