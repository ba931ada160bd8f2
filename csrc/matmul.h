// Matrix products on the CPU: oneDNN's or torch's own.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <optional>
#include <string_view>

namespace asvit_fast {

using LinearPointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                   std::string_view, c10::List<std::optional<at::Scalar>>,
                                   std::optional<std::string_view>);

// oneDNN's product, if this torch has one.
inline const std::optional<c10::TypedOperatorHandle<LinearPointwise>>& onednn() {
  static const auto handle = []() -> std::optional<c10::TypedOperatorHandle<LinearPointwise>> {
    const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!schema) return std::nullopt;
    return schema->typed<LinearPointwise>();
  }();
  return handle;
}

// Whether oneDNN should multiply [m, k] by [k, n]: in float32 torch's own product is MKL's, which uses half of the
// vector units of AMD's processors. Below so many multiply-adds oneDNN is not worth its call from C++.
inline bool prefers_onednn(at::ScalarType type, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t least = 1 << 19;
  return type == at::kFloat && onednn() && m * n * k >= least;
}

// a [M, K] times b^T, b [N, K], plus bias [N] if it is defined.
inline at::Tensor linear(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {}) {
  if (prefers_onednn(a.scalar_type(), a.size(0), b.size(0), a.size(1))) {
    const std::optional<at::Tensor> added = bias.defined() ? std::optional(bias) : std::nullopt;
    return onednn()->call(a, b, added, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
  return bias.defined() ? at::cpu::addmm(bias, a, b.t()) : at::cpu::mm(a, b.t());
}

}  // namespace asvit_fast
