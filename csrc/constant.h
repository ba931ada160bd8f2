// Numbers as types. Included as cpu/vector.h is.
#pragma once

namespace asvit_fast {
namespace {

template <int value>
struct Constant {
  constexpr int operator()() const { return value; }
};

// The numbers 0 ... n - 1 as one type (those of the standard library would bring its headers along).
template <int... values>
struct Integers {};
template <int n, int... values>
struct FirstIntegers : FirstIntegers<n - 1, n - 1, values...> {};
template <int... values>
struct FirstIntegers<0, values...> {
  using Type = Integers<values...>;
};

// Calls run(Constant<orders>()) for 0, 1 or 2 orders.
template <typename Run>
inline void with_orders(int orders, Run run) {
  switch (orders) {
    case 0:
      return run(Constant<0>());
    case 1:
      return run(Constant<1>());
    default:
      return run(Constant<2>());
  }
}

}  // namespace
}  // namespace asvit_fast
