// Windowed attention on tensors: checks, operands and threads, shared by window_attention_taylor and window_attention.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "cpu/dispatch.h"
#include "window_attention_taylor.h"

namespace asvit_fast {
namespace {

constexpr double kGrain = 1 << 18;  // multiply-adds a thread should have at least

template <typename T>
constexpr PerIsa<WindowAttentionTaylorCpu<T>> kKernels;
template <>
constexpr PerIsa<WindowAttentionTaylorCpu<float>> kKernels<float> = ASVIT_FAST_PER_ISA(window_attention_taylor_f32);
template <>
constexpr PerIsa<WindowAttentionTaylorCpu<double>> kKernels<double> = ASVIT_FAST_PER_ISA(window_attention_taylor_f64);

template <typename T>
AttentionOperand<T> operand(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), x.stride(5)}};
}

template <typename T>
WindowAttentionTaylor<T> make_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      at::IntArrayRef window, at::IntArrayRef shift, const T* bias, double scale,
                                      const at::Tensor& output, T* statistics = nullptr) {
  return {operand<T>(q),
          operand<T>(k),
          operand<T>(v),
          bias,
          output.mutable_data_ptr<T>(),
          {q.size(2), window[0], shift[0]},
          {q.size(3), window[1], shift[1]},
          q.size(1),
          q.size(4),
          q.size(5),
          static_cast<int>(q.size(0)) - 1,
          static_cast<T>(scale),
          statistics};
}

template <typename T>
void run_cpu(const WindowAttentionTaylor<T>& problem, const at::TensorOptions& options) {
  const auto kernel = select(kKernels<T>);
  const AttentionWorkspace workspace(problem);
  const double products = (problem.orders + 1) * (problem.orders + 2);  // of a query's and a key's components
  const double work = products * kQueriesPerUnit * static_cast<double>(workspace.values);
  const auto grain = static_cast<int64_t>(kGrain / (work + 1)) + 1;
  at::parallel_for(0, window_count(problem) * units_per_window(problem), grain, [&](int64_t begin, int64_t end) {
    const at::Tensor memory = at::empty({workspace.total()}, options);
    kernel(problem, begin, end, memory.mutable_data_ptr<T>());
  });
}

}  // namespace
}  // namespace asvit_fast
