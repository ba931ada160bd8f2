// Matrix products of large tensors on the CPU: our kernel's, oneDNN's or torch's own.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <optional>
#include <string_view>

#include "cpu/for_each_isa.h"

namespace asvit_fast {

// Whether our kernel multiplies float32, and 16-bit numbers that it widens: where it was measured to be at least as
// fast as MKL and oneDNN. With wider vectors it was not measured yet, with narrower ones it is slower.
inline bool prefers_own_products() { return active_isa() == Isa::avx2; }

// A weight [N, K] in the order of our kernel, for the instruction set of the moment.
at::Tensor pack_weight(const at::Tensor& weight);

// x [rows, K] times the transpose of a packed weight [N, K], plus bias [N] if it is defined; float32.
at::Tensor multiply_packed(const at::Tensor& x, const at::Tensor& packed, int64_t outputs, const at::Tensor& bias);

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

// A Linear layer that many threads apply to rows of their own.
class SharedLinear {
 public:
  // The product is in the weight's type, or in float32 where our kernel makes it. bias: of the weight's type, or
  // undefined.
  SharedLinear(const at::Tensor& weight, const at::Tensor& bias);

  // x [rows, K], float32 or float64 -> [rows, N].
  at::Tensor operator()(const at::Tensor& x) const;

 private:
  at::Tensor weight_, bias_, packed_;  // the last only for our kernel
};

// a [M, K] times b^T, b [N, K], plus bias [N] if it is defined.
inline at::Tensor linear(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {}) {
  if (prefers_onednn(a.scalar_type(), a.size(0), b.size(0), a.size(1))) {
    const std::optional<at::Tensor> added = bias.defined() ? std::optional(bias) : std::nullopt;
    return onednn()->call(a, b, added, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
  return bias.defined() ? at::cpu::addmm(bias, a, b.t()) : at::cpu::mm(a, b.t());
}

inline SharedLinear::SharedLinear(const at::Tensor& weight, const at::Tensor& bias) : weight_(weight), bias_(bias) {
  if (weight.scalar_type() == at::kDouble || !prefers_own_products()) return;
  packed_ = pack_weight(weight);
  if (bias.defined()) bias_ = bias.to(at::kFloat);
}

inline at::Tensor SharedLinear::operator()(const at::Tensor& x) const {
  if (packed_.defined() && x.scalar_type() == at::kFloat) return multiply_packed(x, packed_, weight_.size(0), bias_);
  return linear(x.to(weight_.scalar_type()), weight_, bias_);
}

}  // namespace asvit_fast
