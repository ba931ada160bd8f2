// What ops along the last dimension of (x, x', x'') work on. No torch header needed.
#pragma once

#include <cstdint>

namespace asvit_fast {

// A stack of `orders` + 1 contiguous matrices: the value, then its derivatives with respect to t.
template <typename T>
struct TaylorMatrix {
  const T* input;  // [orders + 1, count, size]
  T* output;       // [orders + 1, count, size]
  int64_t count;   // rows
  int64_t size;    // values in a row, at least 1
  int orders;      // 0, 1 or 2
};

}  // namespace asvit_fast
