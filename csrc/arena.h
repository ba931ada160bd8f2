// A thread's memory, handed out in pieces. No torch header.
#pragma once

#include <cstdint>

namespace asvit_fast {
namespace {  // one copy per including file: nothing compiled for one instruction set may be linked into another

// Without memory it measures what the pieces take together. Each is aligned to 64 bytes, as the memory is.
class Arena {
 public:
  explicit Arena(char* memory) : start_(memory), used_(0) {}

  template <typename Element>
  Element* take(int64_t count) {
    char* piece = start_ ? start_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(Element)) + 63) / 64 * 64;
    return reinterpret_cast<Element*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_;
};

}  // namespace
}  // namespace asvit_fast
