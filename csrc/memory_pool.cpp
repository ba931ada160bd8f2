#include "memory_pool.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>

namespace asvit_fast {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kSmallest = ~size_t(0);  // it sees what goes too far only in memory of its own
#else
constexpr size_t kSmallest = size_t(1) << 20;  // below, the C library keeps memory itself
#endif
constexpr size_t kHugePage = size_t(2) << 20;
constexpr const char* kShareVariable = "ASVIT_FAST_MEMORY_SHARE";  // 4: a fourth of the machine's memory is kept
constexpr int64_t kShare = 16;                                     // without it

struct Block {
  void* memory;
  size_t size;
};

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

// An eighth of the power of two below: a block serves sizes that differ a little.
size_t block_size(size_t bytes) {
  size_t step = size_t(1) << 17;
  while (step * 16 <= bytes) step *= 2;
  return round_up(bytes, bytes >= kHugePage ? std::max(step, kHugePage) : step);
}

// Aligned to a huge page, so that the system can use such pages.
void* map_memory(size_t size) {
  const size_t reserved = size + kHugePage;
  void* const start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, start != MAP_FAILED, "asvit_fast: not enough memory for ", size, " bytes");
  const auto address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t aligned = round_up(address, kHugePage);
  if (aligned > address) munmap(start, aligned - address);
  const size_t behind = address + reserved - (aligned + size);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (behind >= page) munmap(reinterpret_cast<void*>(round_up(aligned + size, page)), behind / page * page);
  void* const memory = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
  if (size >= kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return memory;
}

int64_t share_of_memory() {
  const char* const given = std::getenv(kShareVariable);
  const int64_t wanted = given ? std::atoll(given) : kShare, share = wanted >= 1 ? wanted : kShare;
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? pages / share * page : int64_t(1) << 28;
}

class Pool final : public c10::Allocator {
 public:
  // Never destroyed: tensors may outlive everything else at the end of a process.
  static Pool& instance() {
    static Pool* const pool = [] {
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return new Pool();
    }();
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = block_size(std::max<size_t>(bytes, 1));
    auto* const block = new Block(take(size));
    c10::reportMemoryUsageToProfiler(block->memory, static_cast<int64_t>(block->size), 0, 0, c10::Device(c10::kCPU));
    return {block->memory, block, &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim();
  }
  int64_t limit() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return limit_;
  }
  int64_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  Block take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(size);
      if (found != free_.end() && found->first <= size + size / 4) {
        const Block block = {found->second, found->first};
        free_.erase(found);
        kept_ -= static_cast<int64_t>(block.size);
        return block;
      }
    }
    return {map_memory(size), size};
  }

  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    c10::reportMemoryUsageToProfiler(block->memory, -static_cast<int64_t>(block->size), 0, 0, c10::Device(c10::kCPU));
    Pool& pool = instance();
    const std::lock_guard<std::mutex> lock(pool.mutex_);
    pool.free_.emplace(block->size, block->memory);
    pool.kept_ += static_cast<int64_t>(block->size);
    pool.trim();
    delete block;
  }

  // The largest go first: they cost least to get again, for each byte.
  void trim() {
    while (kept_ > limit_ && !free_.empty()) {
      const auto last = std::prev(free_.end());
      munmap(last->second, last->first);
      kept_ -= static_cast<int64_t>(last->first);
      free_.erase(last);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  int64_t kept_ = 0, limit_ = share_of_memory();
};

}  // namespace

at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t count = c10::multiply_integers(sizes);
  const auto type = c10::typeMetaToScalarType(options.dtype());
  if (!options.device().is_cpu() || static_cast<size_t>(count) * c10::elementSize(type) < kSmallest)
    return at::empty(sizes, options);
  at::Tensor tensor = at::detail::empty_generic(sizes, &Pool::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                type, std::nullopt);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory() && at::isFloatingType(type))
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  return tensor;
}

void set_pool_limit(int64_t bytes) { Pool::instance().set_limit(bytes); }
int64_t pool_limit() { return Pool::instance().limit(); }
int64_t pool_size() { return Pool::instance().kept(); }

}  // namespace asvit_fast
