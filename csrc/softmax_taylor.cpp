// asvit_fast_C::softmax_taylor: schema, checks, allocation, threads and streams. The arithmetic is in cpu/ and cuda/.
#include "softmax_taylor.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "stacked.h"

#ifdef ASVIT_FAST_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace asvit_fast {
namespace {

constexpr const char* kOp = "softmax_taylor";

template <typename T>
constexpr PerIsa<SoftmaxTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<SoftmaxTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(softmax_taylor_f32);
template <>
constexpr PerIsa<SoftmaxTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(softmax_taylor_f64);

template <typename T>
void run_cpu(const at::Tensor& input, const at::Tensor& output) {
  const TaylorMatrix<T> matrix = stacked_matrix<T>(input, output);
  const auto kernel = select(kKernels<T>);
  at::parallel_for(0, matrix.count, rows_per_thread(matrix.size),
                   [&](int64_t begin, int64_t end) { kernel(matrix, begin, end); });
}

at::Tensor softmax_taylor_cpu(const at::Tensor& x) {
  taylor_orders(kOp, x);
  check_rows(kOp, x);
  const at::ScalarType type = compute_type(x.scalar_type());
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, kOp, ": no kernel for ", x.scalar_type());
  const at::Tensor input = x.to(type).contiguous();
  const at::Tensor output = at::empty_like(input);
  if (type == at::kFloat) {
    run_cpu<float>(input, output);
  } else {
    run_cpu<double>(input, output);
  }
  return output.to(x.scalar_type());
}

#ifdef ASVIT_FAST_CUDA
at::Tensor softmax_taylor_gpu(const at::Tensor& x) {
  taylor_orders(kOp, x);
  check_rows(kOp, x);
  const ScalarType type = scalar_type(kOp, x.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor output = at::empty_like(input);
  if (input.numel() == 0) return output;  // a grid of no blocks is an invalid launch
  softmax_taylor_cuda(stacked_matrix(input, output), type, c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) { library.def("softmax_taylor(Tensor x) -> Tensor"); }

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) { library.impl("softmax_taylor", softmax_taylor_cpu); }

#ifdef ASVIT_FAST_CUDA
TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) { library.impl("softmax_taylor", softmax_taylor_gpu); }
#endif

}  // namespace asvit_fast
