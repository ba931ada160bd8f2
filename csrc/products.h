// Matrix products of large tensors on the CPU: our kernel's, oneDNN's or torch's own.
#pragma once

#include <algorithm>

#include "tensor_utils.h"

namespace asvit_fast {

// Whether our kernel multiplies float32, and 16-bit numbers (those of bfloat16 by instructions for them where there are
// any, else widened): where it is at least as fast as MKL and oneDNN, as measured on Zen 3 and Zen 4.
inline bool prefers_own_products() { return active_isa() != Isa::portable; }

// A weight [N, K] in the order of our kernel, for the instruction set of the moment.
Tensor pack_weight(const Tensor& weight);

// x [rows, K], contiguous, times the transpose of a packed weight [N, K], plus bias [N], float32, if there is one. x
// and the result are bfloat16 where the packed weight is, else float32.
Tensor multiply_packed(const Tensor& x, const Tensor& packed, int64_t outputs, const OptionalTensor& bias);

// oneDNN's product as torch declares it in a header that is not for others; a torch without oneDNN lacks it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute, const double** scalars,
    int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);

// Whether oneDNN should multiply [m, k] by [k, n]: in float32 torch's own product is MKL's, which uses half of the
// vector units of AMD's processors that have wide ones. Below so many multiply-adds oneDNN is not worth its call from
// C++.
inline bool prefers_onednn(Dtype type, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t least = 1 << 19;
  static const bool wide = runs(Isa::avx512) && &aoti_torch_cpu__linear_pointwise != nullptr;
  return wide && type == kFloat && m * n * k >= least;
}

// y = x or y += x, matrices of one size whose rows may be apart.
inline void copy_rows(const Tensor& y, const Tensor& x, bool more) {
  float* const to = y.mutable_data_ptr<float>();
  const float* const from = x.const_data_ptr<float>();
  const int64_t columns = y.size(1), distance = y.stride(0), from_distance = x.stride(0);
  for (int64_t row = 0; row < y.size(0); ++row) {
    float* const line = to + row * distance;
    const float* const from_line = from + row * from_distance;
    for (int64_t i = 0; i < columns; ++i) line[i] = more ? line[i] + from_line[i] : from_line[i];
  }
}

// A float32 matrix whose rows, or columns, follow each other without gaps, as those of the given one do but for gaps:
// of other weights oneDNN has a product for reference only, a hundred times slower.
inline Tensor without_gaps(const Tensor& matrix) {
  const bool by_rows = matrix.stride(1) == 1;
  const Tensor lines = by_rows ? matrix : transposed(matrix);
  if (lines.stride(1) != 1) return as_contiguous(matrix);
  if (lines.stride(0) == lines.size(1)) return matrix;
  const Tensor copy = new_empty(lines.sizes(), kFloat);
  copy_rows(copy, lines, false);
  return by_rows ? copy : transposed(copy);
}

// A Linear layer that many threads apply to rows of their own, or one of them to all rows.
class SharedLinear {
 public:
  // The product is in the weight's type, or in float32 where our kernel widens it. bias: of the weight's type.
  SharedLinear(const Tensor& weight, const OptionalTensor& bias);

  // x [rows, K], contiguous, float32 or float64 -> [rows, N]. alone: no other thread is at work.
  Tensor operator()(const Tensor& x, bool alone) const;

 private:
  Tensor weight_;
  OptionalTensor bias_, packed_, wide_bias_;  // the last two only for our kernel
};

// y [M, N] = a b^T + bias, a [M, K], b [N, K], or, where `more`, y += a b^T. y's rows may be apart. In any thread: the
// C functions do not ask torch's dispatcher.
inline void multiply_into(const Tensor& y, const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool more) {
  AtenTensorHandle added = more ? y.get() : bias ? bias->get() : nullptr;
  if (prefers_onednn(a.scalar_type(), a.size(0), b.size(0), a.size(1))) {
    const Tensor weight = without_gaps(b);
    const char* algorithm = "";
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a.get(), weight.get(), added && !more ? &added : nullptr,
                                                            "none", nullptr, 0, &algorithm, &result));
    return copy_rows(y, Tensor(result), more);  // contiguous
  }
  const Tensor columns = transposed(b);
  if (added) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), added, a.get(), columns.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), a.get(), columns.get()));
  }
}

// The same by a thread that no other works beside. Libraries would take all threads then, and may add in another order
// with more of them; here each takes outputs of its own, in parts that sizes decide alone.
inline void multiply_alone_into(const Tensor& y, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
                                bool more) {
  constexpr int64_t least = 64, most = 16;
  const int64_t outputs = b.size(0),
                parts = std::clamp<int64_t>(outputs / least, 2, most);  // one would run on all threads
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = outputs * i / parts, count = outputs * (i + 1) / parts - first;
      if (count == 0) continue;
      OptionalTensor added;
      if (bias) added = strided(*bias, {count}, bias->strides(), first * bias->stride(0));
      multiply_into(columns_of(y, first, count), a, rows_of(b, first, count), added, more);
    }
  });
}

inline SharedLinear::SharedLinear(const Tensor& weight, const OptionalTensor& bias) : weight_(weight), bias_(bias) {
  if (weight.scalar_type() == kDouble || !prefers_own_products()) return;
  packed_ = pack_weight(weight);
  if (bias) wide_bias_ = as_type(*bias, kFloat);
}

inline Tensor SharedLinear::operator()(const Tensor& x, bool alone) const {
  const bool pairs = packed_ && packed_->scalar_type() == kBFloat16;
  const auto multiply = [&](const Tensor& rows) {
    if (pairs) return multiply_packed(rows, *packed_, weight_.size(0), wide_bias_);
    const Tensor y = new_empty({rows.size(0), weight_.size(0)}, rows.scalar_type());
    (alone ? multiply_alone_into : multiply_into)(y, rows, weight_, bias_, false);
    return y;
  };
  if (packed_ && !pairs && x.scalar_type() == kFloat) return multiply_packed(x, *packed_, weight_.size(0), wide_bias_);
  if (x.scalar_type() == weight_.scalar_type()) return multiply(x);
  const Tensor rounded = new_empty(x.sizes(), weight_.scalar_type());
  if (x.scalar_type() == kFloat) {
    assign<float>(rounded, x);
  } else {
    assign<double>(rounded, x);
  }
  return multiply(rounded);
}

}  // namespace asvit_fast
