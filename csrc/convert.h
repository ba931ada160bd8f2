// Numbers of one type as those of another, in the calling thread. No torch header.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"
#include "scalar_type.h"

namespace asvit_fast {

// widen: `count` numbers of `type` as those of T, float or double.
//
// round_to: the nearest numbers of `type`; of two, the even one.
ASVIT_FAST_FOR_EACH_ISA(widen, const void* from, ScalarType type, int64_t count, T* to)
ASVIT_FAST_FOR_EACH_ISA(round_to, const T* from, int64_t count, ScalarType type, void* to)

}  // namespace asvit_fast
