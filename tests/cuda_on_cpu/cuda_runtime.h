// As much of CUDA as the kernels of csrc/cuda use, on a CPU: blocks run one after the other, and the threads of a
// block, a multiple of 32, take turns, each running until it waits for the others. Slow, for tests: wrong indices,
// missing barriers and threads that do not reach a barrier show without a GPU.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // there is one block at a time
#define __launch_bounds__(...)

using cudaStream_t = void*;

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

// A meeting point of a fixed number of threads.
struct Barrier {
  unsigned expected = 0, arrived = 0, meetings = 0;
};

struct Thread {
  ucontext_t context;
  bool finished;
  const Barrier* waits_at;
  unsigned meeting;  // that it waits for

  bool can_run() const { return !finished && (waits_at == nullptr || waits_at->meetings != meeting); }
};

struct Block {
  std::function<void()> body;  // of every thread
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  std::vector<const void*> shown;  // what each thread shows to the others of its warp
  Barrier all;
  ucontext_t scheduler;
};

inline Block block;
inline Index threadIdx, blockIdx, blockDim;
inline bool backwards = false;  // the order in which threads take turns: results must not depend on it

inline void wait(Barrier& barrier) {
  Thread& thread = block.threads[threadIdx.x];
  thread.waits_at = &barrier;
  thread.meeting = barrier.meetings;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.meetings;
  }
  swapcontext(&thread.context, &block.scheduler);
}

inline void run_thread() {
  block.body();
  block.threads[threadIdx.x].finished = true;
}

inline void start_thread(Thread& thread, char* stack) {
  thread.finished = false;
  thread.waits_at = nullptr;
  getcontext(&thread.context);
  thread.context.uc_stack = {stack, 0, kStackBytes};
  thread.context.uc_link = &block.scheduler;
  makecontext(&thread.context, run_thread, 0);
}

// Gives a turn to each thread of a warp that can run; false if there is none.
inline bool run_warp(unsigned first) {
  bool any = false;
  for (unsigned i = first; i < first + kWarp; ++i) {
    threadIdx.x = backwards ? static_cast<unsigned>(block.threads.size()) - 1 - i : i;
    Thread& thread = block.threads[threadIdx.x];
    if (!thread.can_run()) continue;
    any = true;
    swapcontext(&block.scheduler, &thread.context);
  }
  return any;
}

// Each warp in turn gets as far as it can without the others, so that what no barrier holds back comes too early.
inline void run_block(char* stacks) {
  for (size_t i = 0; i < block.threads.size(); ++i) start_thread(block.threads[i], stacks + i * kStackBytes);
  for (bool any = true; any;) {
    any = false;
    for (unsigned warp = 0; warp < block.threads.size(); warp += kWarp)
      while (run_warp(warp)) any = true;
  }
  for (size_t i = 0; i < block.threads.size(); ++i) {
    if (block.threads[i].finished) continue;
    std::fprintf(stderr, "block %u: thread %zu waits for threads that never come\n", blockIdx.x, i);
    std::abort();
  }
}

// Stacks of the threads of a block, one after the other, for all kernels: only pages that are used take memory.
inline char* thread_stacks() {
  static const std::unique_ptr<char[]> stacks(new char[1024 * kStackBytes]);
  return stacks.get();
}

template <typename Body>
void run_grid(unsigned blocks, unsigned threads, Body body) {
  block.body = body;
  block.threads.resize(threads);
  block.shown.resize(threads);
  block.warps.assign(threads / kWarp, Barrier{kWarp});
  block.all = {threads};
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(thread_stacks());
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::blockDim, cuda_on_cpu::blockIdx, cuda_on_cpu::threadIdx;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block.all); }

inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::block.warps[threadIdx.x / cuda_on_cpu::kWarp]); }

// use(others), where others(lane) is what each lane of the warp has given as `mine`.
template <typename T, typename Use>
auto with_warp(const T& mine, Use use) {
  using namespace cuda_on_cpu;
  Barrier& warp = block.warps[threadIdx.x / kWarp];
  block.shown[threadIdx.x] = &mine;
  wait(warp);
  const unsigned first = threadIdx.x / kWarp * kWarp;
  const auto result =
      use([first](unsigned lane) -> const T& { return *static_cast<const T*>(block.shown[first + lane]); });
  wait(warp);  // before `mine` is gone
  return result;
}

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int lanes) {
  const unsigned other = threadIdx.x % cuda_on_cpu::kWarp ^ static_cast<unsigned>(lanes);
  return with_warp(value, [&](auto others) { return others(other); });
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
