// In the place of csrc/cuda/launch.h.
#pragma once

#include <cuda_runtime.h>

namespace asvit_fast {
namespace {

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t,
                   Arguments... arguments) {
  cuda_on_cpu::run_grid(blocks, threads, [=] { kernel(arguments...); });
}

}  // namespace
}  // namespace asvit_fast
