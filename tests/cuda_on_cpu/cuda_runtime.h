// As much of CUDA as the kernels of csrc/cuda use, on a CPU: blocks run one after the other, and the threads of a block
// take turns, each running until it waits for the others. Slow, for tests: wrong indices, missing barriers and threads
// that do not reach a barrier show without a GPU.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
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

struct Block {
  std::function<void()> body;  // of every thread
  std::vector<ucontext_t> threads;
  std::vector<bool> finished;
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes;  // what each thread gives to the others of its warp
  Barrier all;
  ucontext_t scheduler;
  unsigned progress = 0;  // counts arrivals and ends
};

inline Block block;
inline Index threadIdx, blockIdx, blockDim;
inline bool backwards = false;  // the order in which threads take turns: results must not depend on it

inline void wait(Barrier& barrier) {
  const unsigned meeting = barrier.meetings;
  ++block.progress;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.meetings;
  }
  while (barrier.meetings == meeting) swapcontext(&block.threads[threadIdx.x], &block.scheduler);
}

inline void run_thread() {
  block.body();
  block.finished[threadIdx.x] = true;
  ++block.progress;
}

inline void start_thread(unsigned i, char* stack) {
  ucontext_t& thread = block.threads[i];
  getcontext(&thread);
  thread.uc_stack = {stack, 0, kStackBytes};
  thread.uc_link = &block.scheduler;
  makecontext(&thread, run_thread, 0);
  block.finished[i] = false;
}

// Gives every thread a turn; false once nobody gets any further.
inline bool run_threads() {
  const unsigned before = block.progress;
  const auto count = static_cast<unsigned>(block.threads.size());
  for (unsigned turn = 0; turn < count; ++turn) {
    threadIdx.x = backwards ? count - 1 - turn : turn;
    if (!block.finished[threadIdx.x]) swapcontext(&block.scheduler, &block.threads[threadIdx.x]);
  }
  return block.progress != before;
}

inline void run_block(char* stacks) {
  for (unsigned i = 0; i < block.threads.size(); ++i) start_thread(i, stacks + i * kStackBytes);
  while (run_threads()) {
  }
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    if (block.finished[i]) continue;
    std::fprintf(stderr, "block %u: thread %u waits for threads that never come\n", blockIdx.x, i);
    std::abort();
  }
}

template <typename Body>
void run_grid(unsigned blocks, unsigned threads, Body body) {
  static std::vector<char> stacks(1024 * kStackBytes);
  block.body = body;
  block.threads.resize(threads);
  block.finished.resize(threads);
  block.lanes.resize(threads);
  block.warps.assign((threads + kWarp - 1) / kWarp, Barrier{kWarp});
  block.all = {threads};
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(stacks.data());
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::blockDim, cuda_on_cpu::blockIdx, cuda_on_cpu::threadIdx;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block.all); }

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int lanes) {
  using namespace cuda_on_cpu;
  Barrier& warp = block.warps[threadIdx.x / kWarp];
  std::memcpy(&block.lanes[threadIdx.x], &value, sizeof value);
  wait(warp);
  std::memcpy(&value, &block.lanes[threadIdx.x ^ static_cast<unsigned>(lanes)], sizeof value);
  wait(warp);
  return value;
}
