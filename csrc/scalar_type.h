// Element types of tensors, for code without a torch header.
#pragma once

namespace asvit_fast {

enum class ScalarType { float32, float64, float16, bfloat16 };

}  // namespace asvit_fast
