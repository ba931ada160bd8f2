// In the place of csrc/cuda/ptx.h.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cmath>

namespace asvit_fast {
namespace {

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }

// What is beyond `bits` significant bits of a number of the size of `largest`, cut off.
inline double truncate(double x, double largest, int bits) {
  int exponent;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - bits);
  return std::trunc(x / unit) * unit;
}

// c + sum of a b over four products as a tensor core adds (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of
// NVIDIA tensor cores, 2021): exact products, all cut off one bit below the last of the largest, and the sum to a
// float.
inline float add_products(float c, const std::array<double, 4>& products) {
  double largest = std::fabs(c), sum = 0.0;
  for (const double product : products) largest = std::fmax(largest, std::fabs(product));
  if (largest == 0.0 || !std::isfinite(c)) return c;
  for (const double product : products) {
    if (!std::isfinite(product)) return static_cast<float>(product);
    sum += truncate(product, largest, 25);
  }
  sum += truncate(c, largest, 25);
  return sum == 0.0 ? 0.0f : static_cast<float>(truncate(sum, sum, 24));
}

inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  struct Operands {
    float a[4], b[2];
  } mine;
  const auto as_read = [](float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); };
  for (int i = 0; i < 4; ++i) mine.a[i] = as_read(a[i]);
  for (int i = 0; i < 2; ++i) mine.b[i] = as_read(b[i]);
  const unsigned lane = threadIdx.x % cuda_on_cpu::kWarp;
  const auto sums = with_warp(mine, [&](auto others) {
    std::array<float, 4> sums;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4, column = 2 * (lane % 4) + i % 2;
      sums[i] = c[i];
      for (unsigned half = 0; half < 2; ++half) {  // of the inner dimension
        std::array<double, 4> products;
        for (unsigned k = 0; k < 4; ++k)
          products[k] = static_cast<double>(others(4 * row + k).a[2 * half + i / 2]) * others(4 * column + k).b[half];
        sums[i] = add_products(sums[i], products);
      }
    }
    return sums;
  });
  for (int i = 0; i < 4; ++i) c[i] = sums[i];
}

}  // namespace
}  // namespace asvit_fast
