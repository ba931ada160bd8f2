// asvit_fast_C::gram, linear_weight_gram and layer_norm_weight_rows: schemas, checks, allocation and threads. The
// arithmetic is in cpu/.
#include "per_sample.h"

#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr int64_t kParts = 32;  // whose sums are added in order at the end, whatever the number of threads
constexpr int64_t kPartElements = int64_t(1) << 25;  // of those sums at most: of thousands of samples fewer parts
constexpr int64_t kWeightBytes = 1 << 23;  // of all samples' gradients of a weight, which the last cache holds
constexpr int64_t kPartNumbers = 1 << 13;  // of a row, at least

void check_contiguous(const char* op, const char* name, const Tensor& tensor, int64_t axes) {
  ASVIT_FAST_CHECK(tensor.dim() == axes && tensor.is_contiguous(), op, ": ", name, " must be contiguous with ", axes,
                   " axes, not ", tensor.sizes());
  const Dtype type = tensor.scalar_type();
  ASVIT_FAST_CHECK(type == kFloat || type == kDouble, op, ": ", name, " must be float32 or float64, not ", type);
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x, Sizes sizes) {
  ASVIT_FAST_CHECK(tensor.is_contiguous() && tensor.sizes().equals(sizes) && tensor.scalar_type() == x.scalar_type(),
                   op, ": ", name, " must be contiguous, ", sizes, " of ", x.scalar_type(), ", not ", tensor.sizes(),
                   " of ", tensor.scalar_type());
}

// Calls run(memory) with a Memory(sizes..., arena).
template <typename Memory, typename Run, typename... Sizes>
void with_memory(Run run, Sizes... sizes) {
  Arena measured(nullptr);
  (void)Memory(sizes..., measured);
  const Tensor bytes = empty({measured.used()}, kByte);
  Arena arena(static_cast<char*>(bytes.mutable_data_ptr()));
  run(Memory(sizes..., arena));
}

// The sum of what run(begin, end, gram) adds to the lower triangles of matrices for parts of 0 <= i < count tasks.
template <typename Run>
Tensor sum_of_grams(int64_t samples, int64_t count, Run run) {
  const int64_t size = samples * samples;  // by which, and the count, alone: results do not depend on threads
  const int64_t parts = std::clamp<int64_t>(std::min(count, kPartElements / std::max<int64_t>(size, 1)), 1, kParts);
  const Tensor grams = zeros({parts, samples, samples}, kDouble), sum = zeros({samples, samples}, kDouble);
  double *const all = grams.mutable_data_ptr<double>(), *const to = sum.mutable_data_ptr<double>();
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      if (count > 0) run(count * part / parts, count * (part + 1) / parts, all + part * size);
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) to[i] += all[part * size + i];
  for (int64_t i = 0; i < samples; ++i)
    for (int64_t j = i + 1; j < samples; ++j) to[i * samples + j] = to[j * samples + i];
  return sum;
}

template <typename T>
Tensor gram_of(const SampleRows<T>& rows) {
  const int64_t count = rows.count, parts = std::min(divide_up(count, kPartNumbers), kParts);
  const auto kernel = ASVIT_FAST_SELECT(add_gram<T>);
  return sum_of_grams(rows.samples, parts, [&](int64_t begin, int64_t end, double* gram) {
    const int64_t first = count * begin / parts, last = count * end / parts;
    with_memory<GramMemory>(
        [&](const GramMemory& memory) {
          kernel({rows.rows + first, rows.samples, last - first, rows.distance}, memory, gram);
        },
        rows.samples);
  });
}

Tensor gram_cpu(const Tensor& rows) {
  check_contiguous("gram", "rows", rows, 2);
  Tensor gram;
  with_compute_type("gram", rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    gram = gram_of(SampleRows<T>{rows.const_data_ptr<T>(), rows.size(0), rows.size(1), rows.size(1)});
  });
  return gram;
}

// Of many tokens: sample by sample, as each has its own cache full of them.
template <typename T>
Tensor gram_by_sample(const WeightSamples<T>& problem, Dtype type) {
  const int64_t count = problem.row_numbers();
  const Tensor rows = new_empty({problem.samples, count}, type);
  T* const to = rows.mutable_data_ptr<T>();
  const auto kernel = ASVIT_FAST_SELECT(sample_weight_row<T>);
  parallel_for(0, problem.samples, 1, [&](int64_t begin, int64_t end) {
    const Tensor panel = empty({kPanelTokens * WeightSamples<T>::kPanel}, type);
    for (int64_t sample = begin; sample < end; ++sample)
      kernel(problem, sample, panel.mutable_data_ptr<T>(), to + sample * count);
  });
  return gram_of(SampleRows<T>{to, problem.samples, count, count});
}

// Of few: part by part of the weight, whose gradients of all samples the cache has when they are multiplied.
template <typename T>
Tensor gram_by_part(const WeightSamples<T>& problem) {
  const int64_t width = WeightSamples<T>::kPanel, samples = problem.samples, outputs = problem.outputs;
  const int64_t panels = divide_up(problem.inputs, width);
  const int64_t fitting = std::max(kRowBytes / std::max<int64_t>(samples * kPanelBytes, 1), kLeastPartOutputs);
  const int64_t wanted = std::max(divide_up(outputs, fitting), divide_up(kParts, std::max<int64_t>(panels, 1)));
  const int64_t pieces = std::min(wanted, divide_up(outputs, kLeastPartOutputs));
  const auto kernel = ASVIT_FAST_SELECT(add_weight_gram<T>);
  return sum_of_grams(samples, panels * pieces, [&](int64_t begin, int64_t end, double* gram) {
    with_memory<WeightGramMemory<T>>(
        [&](const WeightGramMemory<T>& memory) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t panel = i / pieces, piece = i % pieces;
            kernel(problem,
                   {panel * width, std::min((panel + 1) * width, problem.inputs), outputs * piece / pieces,
                    outputs * (piece + 1) / pieces},
                   memory, gram);
          }
        },
        samples, divide_up(outputs, pieces));
  });
}

Tensor linear_weight_gram_cpu(const Tensor& x, const Tensor& gradient) {
  constexpr const char* op = "linear_weight_gram";
  check_contiguous(op, "x", x, 3);
  ASVIT_FAST_CHECK(gradient.dim() == 3, op, ": gradient must have 3 axes, not ", gradient.sizes());
  const int64_t samples = x.size(0), tokens = x.size(1);
  check_like(op, "gradient", gradient, x, {samples, tokens, gradient.size(2)});
  if (x.numel() == 0 || gradient.numel() == 0) return zeros({samples, samples}, kDouble);
  Tensor gram;
  with_compute_type(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    // a gradient has the Gram matrix of its transpose, and what is as narrow as a panel needs no packing
    const bool swap = gradient.size(2) < x.size(2) && gradient.size(2) <= WeightSamples<T>::kPanel;
    const Tensor &right = swap ? gradient : x, &left = swap ? x : gradient;
    const WeightSamples<T> problem{
        right.const_data_ptr<T>(), left.const_data_ptr<T>(), samples, tokens, right.size(2), left.size(2)};
    const int64_t bytes = samples * problem.row_numbers() * static_cast<int64_t>(sizeof(T));
    gram = tokens >= kPanelTokens && bytes <= kWeightBytes ? gram_by_sample(problem, x.scalar_type())
                                                           : gram_by_part(problem);
  });
  return gram;
}

Tensor layer_norm_weight_rows_cpu(const Tensor& x, const Tensor& mean, const Tensor& inverse_std,
                                  const Tensor& gradient) {
  constexpr const char* op = "layer_norm_weight_rows";
  check_contiguous(op, "x", x, 3);
  const int64_t samples = x.size(0), tokens = x.size(1), channels = x.size(2);
  check_like(op, "gradient", gradient, x, x.sizes());
  check_like(op, "mean", mean, x, {samples, tokens});
  check_like(op, "inverse_std", inverse_std, x, {samples, tokens});
  const Tensor rows = empty({samples, channels}, x.scalar_type());
  with_compute_type(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormSamples<T> problem{x.const_data_ptr<T>(),
                                 gradient.const_data_ptr<T>(),
                                 mean.const_data_ptr<T>(),
                                 inverse_std.const_data_ptr<T>(),
                                 tokens,
                                 channels};
    T* const to = rows.mutable_data_ptr<T>();
    const auto kernel = ASVIT_FAST_SELECT(norm_weight_rows<T>);
    const double work = static_cast<double>(tokens * channels);
    parallel_for(0, samples, grain_size(kElements, work),
                 [&](int64_t begin, int64_t end) { kernel(problem, begin, end, to); });
  });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("gram(Tensor rows) -> Tensor");
  library.def("linear_weight_gram(Tensor x, Tensor gradient) -> Tensor");
  library.def("layer_norm_weight_rows(Tensor x, Tensor mean, Tensor inverse_std, Tensor gradient) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("gram", TORCH_BOX(&gram_cpu));
  library.impl("linear_weight_gram", TORCH_BOX(&linear_weight_gram_cpu));
  library.impl("layer_norm_weight_rows", TORCH_BOX(&layer_norm_weight_rows_cpu));
}

}  // namespace asvit_fast
