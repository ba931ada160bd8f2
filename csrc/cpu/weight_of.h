// exp(x) of numbers that are not positive, in as few steps as single precision allows. Included as vector.h is.
#pragma once

#include "cpu/vector.h"

namespace asvit_fast {
namespace {

// The weight exp(x) of a score x <= 0, less the row's maximum, as 2^n 2^r: rounding to n and exponent bits as in
// vector.h, the bias of the exponent in the number that rounds. The polynomial is 2^r to 1e-7 on -1/2 <= r <= 1/2
// (minimax, 1 at 0). The maximum's own weight is exactly 1.
inline Vector<float> weight_of(Vector<float> x) {
  constexpr float coefficients[] = {1.f, 0.69314698f, 0.24022242f, 0.055507337f, 0.0096715128f, 0.0013264727f};
  constexpr float rounding = 12582912.f + 127.f, log2_e = 1.44269504f, lowest = -88.02969f;  // below, it is 0
  x = lowest > x ? broadcast<float>(lowest) : x;
  const Vector<float> shifted = x * log2_e + rounding;
  VectorOf<float>::Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  Vector<float> power;
  std::memcpy(&power, &bits, sizeof power);
  return polynomial<float>(coefficients, x * log2_e - (shifted - rounding)) * power;
}

inline Vector<double> weight_of(Vector<double> x) { return exp_negative<double>(x); }

}  // namespace
}  // namespace asvit_fast
