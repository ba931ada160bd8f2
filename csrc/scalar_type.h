// Element types of tensors, for code without a torch header.
#pragma once

namespace asvit_fast {

enum class ScalarType { float32, float64, float16, bfloat16 };

namespace {

constexpr int element_bytes(ScalarType type) {
  return type == ScalarType::float64 ? 8 : type == ScalarType::float32 ? 4 : 2;
}

// Calls run(T()) with the C++ type T of `type`; those of half precision are the caller's: CUDA's own, or float where
// half precision is computed in single precision.
template <typename Half, typename BFloat16, typename Run>
void with_type(ScalarType type, Run run) {
  switch (type) {
    case ScalarType::float32:
      return run(float());
    case ScalarType::float64:
      return run(double());
    case ScalarType::float16:
      return run(Half());
    case ScalarType::bfloat16:
      return run(BFloat16());
  }
}

}  // namespace
}  // namespace asvit_fast
