#include "memory_pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
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
constexpr const char* kShareVariable = "ASVIT_FAST_MEMORY_SHARE";  // 4: a fourth of the machine's memory; 0: nothing
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

// Aligned to a huge page, so that the system can use such pages; null where there is no memory.
void* map_memory(size_t size) {
  const size_t reserved = size + kHugePage;
  void* const start = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
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

// Bytes of the machine, or of the container that the process is in.
int64_t machine_memory() {
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  int64_t memory = pages > 0 && page > 0 ? pages * page : int64_t(1) << 32;
  for (const char* const path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit;
    if (std::ifstream(path) >> limit && limit > 0) memory = std::min(memory, limit);  // "max" is no number
  }
  return memory;
}

class Pool {
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

  Block take(size_t bytes) {
    const size_t size = block_size(bytes);
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
    void* memory = map_memory(size);
    if (!memory && free_all() > 0) memory = map_memory(size);
    if (!memory) throw_no_memory(size);
    return {memory, size};
  }

  // Bytes that were kept.
  int64_t free_all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t kept = kept_;
    trim(0);
    return kept;
  }

  void give_back(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace(block.size, block.memory);
    kept_ += static_cast<int64_t>(block.size);
    trim(limit_);
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim(limit_);
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
  // The largest go first: they cost least to get again, for each byte.
  void trim(int64_t limit) {
    while (kept_ > limit && !free_.empty()) {
      const auto last = std::prev(free_.end());
      munmap(last->second, last->first);
      kept_ -= static_cast<int64_t>(last->first);
      free_.erase(last);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  int64_t kept_ = 0, limit_ = memory_share();
};

// Whether torch was asked to fill what it allocates: with NaN, so that what nobody writes shows. It is seen by asking.
bool fills_new_memory() {
  const Tensor tensor = empty({8}, kFloat);
  const auto* const numbers = tensor.const_data_ptr<float>();
  return std::all_of(numbers, numbers + 8, [](float number) { return std::isnan(number); });
}

}  // namespace

int64_t memory_share() {
  const char* const given = std::getenv(kShareVariable);
  char* end = nullptr;
  const int64_t wanted = given ? std::strtoll(given, &end, 10) : kShare;
  const int64_t share = given && (end == given || *end != 0 || wanted < 0) ? kShare : wanted;
  return share == 0 ? 0 : machine_memory() / share;
}

Tensor new_empty(Sizes sizes, Dtype type) {
  const size_t bytes = static_cast<size_t>(product(sizes)) * bytes_of(type);
  if (bytes < kSmallest || Pool::instance().limit() == 0) return empty(sizes, type);
  auto* const block = new Block(Pool::instance().take(bytes));
  const auto give_back = [](void*, void* context) {
    auto* const block = static_cast<Block*>(context);
    Pool::instance().give_back(*block);
    delete block;
  };
  const OwnedSizes strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block->memory, static_cast<int64_t>(sizes.size()), sizes.data(),
                                         strides.data(), 0, code_of(type), aoti_torch_device_type_cpu(), -1, &handle,
                                         aoti_torch_layout_strided(), nullptr, 0, give_back, block));
  if (fills_new_memory()) std::memset(block->memory, 0xff, bytes);  // NaN in every type
  return Tensor(handle);
}

void set_pool_limit(int64_t bytes) { Pool::instance().set_limit(bytes); }
int64_t pool_limit() { return Pool::instance().limit(); }
int64_t pool_size() { return Pool::instance().kept(); }
int64_t free_pool() { return Pool::instance().free_all(); }

}  // namespace asvit_fast
