// asvit_fast_C::weight_changes: whether what was made of a weight, as its packed form, still holds.
#include <atomic>

#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr int64_t kLines = 512;  // a thread looks at that many at least: a microsecond or more, each comes from memory
constexpr int64_t kHead = 3;     // of a state: how often the weight has changed, its version and its address

// How many numbers of a contiguous weight are looked at: in every row and every column one.
int64_t sample_count(const Tensor& weight) {
  const int64_t columns = weight.size(-1);
  return columns == 0 ? 0 : std::max(columns, weight.numel() / columns);
}

bool differs(int64_t value, int64_t& before) {
  const bool is_new = before != value;
  before = value;
  return is_new;
}

// Writes some numbers of a weight to `known`, as changes of `weight.data` have no version, and says whether they were
// others. Each is in a page of memory of its own: without divisions and branches many are fetched at a time.
template <typename T>
bool update_samples(const Tensor& weight, int64_t* known) {
  const T* numbers = static_cast<const T*>(weight.const_data_ptr());
  const int64_t columns = weight.size(-1), count = weight.numel() > 0 ? sample_count(weight) : 0;
  const int64_t rows = count > 0 ? weight.numel() / columns : 0;
  std::atomic<bool> changed{false};
  parallel_for(0, count, kLines, [&](int64_t begin, int64_t end) {
    bool differ = false;
    for (int64_t i = begin, row = begin % rows, column = begin % columns; i < end; ++i) {
      differ |= differs(static_cast<int64_t>(numbers[row * columns + column]), known[i]);
      row = row + 1 == rows ? 0 : row + 1;
      column = column + 1 == columns ? 0 : column + 1;
    }
    if (differ) changed = true;
  });
  return changed;
}

bool update_samples(const Tensor& weight, int64_t* known) {
  switch (weight.element_size()) {
    case 2:
      return update_samples<uint16_t>(weight, known);
    case 4:
      return update_samples<uint32_t>(weight, known);
    default:
      return update_samples<uint64_t>(weight, known);
  }
}

void check_weight(const Tensor& weight) {
  ASVIT_FAST_CHECK(weight.dim() > 0 && weight.is_contiguous(), "weight_changes: weight must be contiguous, not ",
                   weight.sizes());
  ASVIT_FAST_CHECK(is_floating(weight.scalar_type()), "weight_changes: weight must be floating point, not ",
                   weight.scalar_type());
}

int64_t state_size(const Tensor& weight) {
  check_weight(weight);
  return kHead + sample_count(weight);
}

// How often a weight was found to be another one: by its version, which autograd counts, its address, and some of its
// numbers. Whoever keeps what he made of it keeps this number with it: it cannot be lost, whatever interrupts him.
int64_t weight_changes_cpu(const Tensor& weight, int64_t version, const Tensor& state) {
  check_weight(weight);
  ASVIT_FAST_CHECK(state.scalar_type() == kLong && state.is_contiguous() && state.numel() == state_size(weight),
                   "weight_changes: state must be int64 [", state_size(weight), "] for a weight ", weight.sizes());
  auto* const known = static_cast<int64_t*>(state.mutable_data_ptr());
  bool changed = differs(version, known[1]);
  changed |= differs(reinterpret_cast<int64_t>(weight.const_data_ptr()), known[2]);
  changed |= update_samples(weight, known + kHead);
  return known[0] += changed ? 1 : 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("weight_changes(Tensor weight, int version, Tensor(a!) state) -> int");
  library.def("weight_state_size(Tensor weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("weight_changes", TORCH_BOX(&weight_changes_cpu));
  library.impl("weight_state_size", TORCH_BOX(&state_size));
}

}  // namespace asvit_fast
