// Starting a kernel: the only syntax here that no C++ compiler knows, as tests/cuda_on_cpu runs the kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

namespace asvit_fast {
namespace {

// blocks: up to 2^31 - 1
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   Arguments... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
}

}  // namespace
}  // namespace asvit_fast
