// asvit_fast_C::patch_merge and its backward pass on the CPU: schemas, checks, allocation, threads and matrix products.
//
// Neighbourhoods are never there all at once: blocks of them are copied into a buffer that the cache holds, normalised
// there (cpu/) and multiplied by torch's matrix product. Blocks, and the order in which their sums are added, depend on
// shapes only.
#include "patch_merge.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "products.h"
#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "patch_merge";
constexpr int64_t kFewTokens = 96;         // below, the product of a block is slow
constexpr int64_t kBlocks = 4;             // that maps are cut into at least, as far as blocks do not get that small
constexpr int64_t kBufferBytes = 1 << 19;  // of a block, which the cache holds beside a part of the weight
constexpr int64_t kPieces = 16;            // of the gradient of the weights, at most
constexpr int64_t kWeightRows = 256;       // outputs whose gradients are computed together, about
constexpr int64_t kFeatures = 256;         // of the parameters' gradients that are computed together

// A range of output rows, through all images.
struct Block {
  int64_t begin, end;
};

// What all parts of one call share.
struct Merge {
  Neighbourhoods map;
  int64_t images, outputs;
  double eps;
  at::ScalarType compute_type;                   // LayerNorm's type; the products have the weight's
  at::Tensor x, weight, norm_weight, norm_bias;  // weight [outputs, features]

  int64_t output_rows() const { return images * map.out_height; }
  int64_t output_tokens() const { return output_rows() * map.out_width; }
  at::TensorOptions options() const { return x.options().dtype(compute_type); }

  int64_t rows_per_block() const {
    const int64_t item = compute_type == at::kDouble ? 8 : 4;
    const int64_t cached = kBufferBytes / (map.features() * item);
    const int64_t tokens = std::max(kFewTokens, std::min(output_tokens() / kBlocks, cached));
    const int64_t reach = (map.kernel + map.stride - 1) / map.stride - 1;  // blocks two apart share no input
    const int64_t rows = std::max((tokens + map.out_width - 1) / map.out_width, reach);
    const int64_t blocks = (output_rows() + rows - 1) / rows;
    return std::max((output_rows() + blocks - 1) / blocks, reach);
  }
  int64_t blocks() const { return (output_rows() + rows_per_block() - 1) / rows_per_block(); }
  Block block(int64_t index) const {
    const int64_t rows = rows_per_block();
    return {index * rows, std::min((index + 1) * rows, output_rows())};
  }
  // Of [output tokens, ...]
  at::Tensor part(const at::Tensor& tensor, const Block& block) const {
    return tensor.narrow(0, block.begin * map.out_width, (block.end - block.begin) * map.out_width);
  }
  at::Tensor buffer() const {
    return at::empty({rows_per_block() * map.out_width * map.features() + kRowSlack}, options());
  }
};

void check(const at::Tensor& x, const at::Tensor& weight, int64_t kernel, int64_t stride, const at::Tensor& norm_weight,
           const OptionalTensor& norm_bias, at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(is_count(kernel, 1) && is_count(stride, 1) && is_padding(padding), "patch_merge: kernel ", kernel,
                    " and stride ", stride, " must be positive, padding ", padding,
                    " four numbers of zeros, all below 2^31");
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 2 && x.size(3) > 0 && weight.size(1) % x.size(3) == 0 &&
                        weight.size(1) / x.size(3) == kernel * kernel,
                    "patch_merge: x must be [B, H, W, C] and weight [Cout, C*", kernel, "*", kernel, "], not ",
                    x.sizes(), " and ", weight.sizes());
  scalar_type(kOp, x.scalar_type());
  scalar_type(kOp, weight.scalar_type());
  check_device_and_type(kOp, "weight", weight, x);
  check_operand(kOp, "norm_weight", norm_weight, {weight.size(1)}, x);
  check_operand(kOp, "norm_bias", norm_bias, {weight.size(1)}, x);
}

Merge make_merge(const at::Tensor& x, const at::Tensor& weight, int64_t kernel, int64_t stride,
                 const at::Tensor& norm_weight, const OptionalTensor& norm_bias, double eps, bool channels_last,
                 at::IntArrayRef padding) {
  check(x, weight, kernel, stride, norm_weight, norm_bias, padding);
  Merge merge;
  merge.map = {x.size(1),
               x.size(2),
               x.size(3),
               kernel,
               stride,
               padding[0],
               padding[2],
               patches_along(x.size(1), padding[0] + padding[1], kernel, stride),
               patches_along(x.size(2), padding[2] + padding[3], kernel, stride),
               channels_last};
  merge.images = x.size(0);
  merge.outputs = weight.size(0);
  merge.eps = eps;
  merge.compute_type = x.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  merge.x = x.detach().contiguous();
  merge.weight = weight.detach();
  merge.norm_weight = norm_weight.detach().to(merge.compute_type).contiguous();
  if (norm_bias) merge.norm_bias = norm_bias->detach().to(merge.compute_type).contiguous();
  return merge;
}

// The input rows that a block's neighbourhoods touch, in LayerNorm's type; `problem` gets their address.
template <typename T>
at::Tensor input_rows(const Merge& merge, const Block& block, PatchMerge<T>& problem) {
  const Neighbourhoods& map = merge.map;
  const auto row = [&](int64_t output_row, int64_t offset) {  // of the input
    const int64_t inside =
        std::clamp<int64_t>(output_row % map.out_height * map.stride - map.top + offset, 0, map.height);
    return output_row / map.out_height * map.height + inside;
  };
  const int64_t begin = row(block.begin, 0), end = std::max(begin, row(block.end - 1, map.kernel));
  const at::Tensor rows = merge.x.flatten(0, 1).narrow(0, begin, end - begin).to(merge.compute_type);
  problem.tokens = rows.const_data_ptr<T>();
  problem.first_row = begin;
  return rows;
}

// Rows [tokens, features] of a block, in `buffer`.
template <typename T>
at::Tensor normalised_rows(const Merge& merge, const Block& block, PatchMerge<T> problem, const at::Tensor& buffer) {
  const int64_t columns = merge.map.out_width, tokens = (block.end - block.begin) * columns;
  const at::Tensor source = input_rows(merge, block, problem);
  ASVIT_FAST_SELECT(patch_merge_rows<T>)(problem, block.begin * columns, block.end * columns,
                                         buffer.mutable_data_ptr<T>());
  return buffer.narrow(0, 0, tokens * merge.map.features()).view({tokens, merge.map.features()});
}

template <typename T>
PatchMerge<T> make_problem(const Merge& merge, const at::Tensor& statistics, bool differentiate) {
  T* mean = statistics.mutable_data_ptr<T>();
  return {merge.map,
          nullptr,
          0,
          pointer_or_null<T>(merge.norm_weight),
          pointer_or_null<T>(merge.norm_bias),
          static_cast<T>(merge.eps),
          mean,
          mean + merge.output_tokens(),
          differentiate};
}

std::tuple<at::Tensor, at::Tensor> patch_merge_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t kernel,
                                                   int64_t stride, const at::Tensor& norm_weight,
                                                   const OptionalTensor& norm_bias, const OptionalTensor& bias,
                                                   double eps, bool channels_last, at::IntArrayRef padding) {
  const Merge merge = make_merge(x, weight, kernel, stride, norm_weight, norm_bias, eps, channels_last, padding);
  const auto& map = merge.map;
  const at::Tensor output = new_empty({merge.output_tokens(), merge.outputs}, weight.options());
  const at::Tensor statistics = at::empty({2, merge.images, map.out_height, map.out_width}, merge.options());
  check_operand(kOp, "bias", bias, {merge.outputs}, x);
  at::Tensor offset;
  if (bias) offset = bias->detach().to(weight.scalar_type());
  if (output.numel() > 0)
    with_compute_type(kOp, merge.compute_type, [&](auto zero) {
      using T = decltype(zero);
      const auto problem = make_problem<T>(merge, statistics, false);
      const SharedLinear layer(merge.weight, offset);
      at::parallel_for(0, merge.blocks(), 1, [&](int64_t begin, int64_t end) {
        const at::AutoDispatchBelowADInplaceOrView guard;  // a guard of the calling thread does not hold in others
        const at::Tensor buffer = merge.buffer();
        for (int64_t i = begin; i < end; ++i) {
          const Block block = merge.block(i);
          merge.part(output, block).copy_(layer(normalised_rows<T>(merge, block, problem, buffer)));
        }
      });
    });
  return {output.view({merge.images, map.out_height, map.out_width, merge.outputs}), statistics};
}

// Gradient of x. Blocks that follow each other add to the same tokens: first go the even ones, then the odd ones.
template <typename T>
at::Tensor input_gradient(const Merge& merge, const PatchMerge<T>& problem, const at::Tensor& gradient) {
  const at::Tensor grad_x = new_empty(merge.x.sizes(), merge.options()).zero_();
  const int64_t features = merge.map.features(), columns = merge.map.out_width;
  const SharedLinear layer(merge.weight.t(), {});  // [features, outputs]
  for (int64_t parity = 0; parity < 2; ++parity)
    at::parallel_for(0, (merge.blocks() + 1 - parity) / 2, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView guard;  // a guard of the calling thread does not hold in others
      const at::Tensor buffer = merge.buffer();
      const at::Tensor workspace = at::empty({2 * (features + kRowSlack)}, merge.options());
      for (int64_t i = begin; i < end; ++i) {
        const Block block = merge.block(2 * i + parity);
        const at::Tensor rows = normalised_rows<T>(merge, block, problem, buffer);
        const at::Tensor grad_rows =
            layer(merge.part(gradient, block).to(merge.compute_type)).to(merge.compute_type).contiguous();
        ASVIT_FAST_SELECT(patch_merge_gradient<T>)(problem, block.begin * columns, block.end * columns,
                                                   rows.const_data_ptr<T>(), grad_rows.const_data_ptr<T>(),
                                                   workspace.mutable_data_ptr<T>(), grad_x.mutable_data_ptr<T>());
      }
    });
  return grad_x;
}

// gradient^T x [outputs, features], x the normalised rows, and the sum of the gradient [outputs]. Blocks are added in a
// few pieces and these one after the other; columns of the gradient go apart.
template <typename T>
std::tuple<at::Tensor, at::Tensor> parameter_products(const Merge& merge, const PatchMerge<T>& problem,
                                                      const at::Tensor& gradient) {
  const int64_t blocks = merge.blocks(), most = std::min(kPieces, blocks);
  const int64_t pieces = std::clamp<int64_t>(merge.output_tokens() / (4 * merge.outputs), 1, most);
  const int64_t groups = std::max<int64_t>(1, merge.outputs / kWeightRows);
  std::vector<at::Tensor> sums, totals;  // one by one, so that all but the first can be freed
  for (int64_t piece = 0; piece < pieces; ++piece) {
    sums.push_back(groups == 1 ? at::Tensor() : at::empty({merge.outputs, merge.map.features()}, merge.options()));
    totals.push_back(at::zeros({merge.outputs}, merge.options()));
  }
  at::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a guard of the calling thread does not hold in others
    const at::Tensor buffer = merge.buffer();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t piece = task / groups, first = merge.outputs * (task % groups) / groups;
      const int64_t count = merge.outputs * (task % groups + 1) / groups - first, start = blocks * piece / pieces;
      at::Tensor sum = groups == 1 ? at::Tensor() : sums[piece].narrow(0, first, count);
      at::Tensor total = totals[piece].narrow(0, first, count);
      for (int64_t i = start; i < blocks * (piece + 1) / pieces; ++i) {
        const at::Tensor part = merge.part(gradient, merge.block(i)).narrow(1, first, count).to(merge.compute_type);
        const at::Tensor rows = normalised_rows<T>(merge, merge.block(i), problem, buffer);
        const at::Tensor more = linear(part.t(), rows.t());
        if (i > start) {
          sum.add_(more);
        } else if (groups > 1) {
          sum.copy_(more);
        } else {
          sum = more.contiguous();
        }
        total.add_(at::cpu::sum(part, at::IntArrayRef{0}));
      }
      if (groups == 1) sums[piece] = sum;
    }
  });
  for (int64_t piece = 1; piece < pieces; ++piece) {
    sums[0].add_(sums[piece]);
    totals[0].add_(totals[piece]);
  }
  return {sums[0], totals[0]};
}

// Gradients of weight, norm_weight, norm_bias and bias.
template <typename T>
std::vector<at::Tensor> parameter_gradients(const Merge& merge, const PatchMerge<T>& problem,
                                            const at::Tensor& gradient) {
  const auto [sums, total] = parameter_products<T>(merge, problem, gradient);
  const at::Tensor wide = merge.weight.to(merge.compute_type).contiguous();
  const at::Tensor grad_norm_weight = at::empty({merge.map.features()}, merge.options());
  const at::Tensor grad_norm_bias = at::empty_like(grad_norm_weight);
  const PatchMergeParameters<T> parameters = {merge.outputs,
                                              merge.map.features(),
                                              wide.const_data_ptr<T>(),
                                              problem.norm_weight,
                                              problem.norm_bias,
                                              total.template const_data_ptr<T>(),
                                              sums.template mutable_data_ptr<T>(),
                                              grad_norm_weight.mutable_data_ptr<T>(),
                                              grad_norm_bias.mutable_data_ptr<T>()};
  const auto kernel = ASVIT_FAST_SELECT(patch_merge_parameters<T>);
  const int64_t parts = (parameters.features + kFeatures - 1) / kFeatures;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel(parameters, i * kFeatures, std::min((i + 1) * kFeatures, parameters.features));
  });
  return {sums, grad_norm_weight, grad_norm_bias, total};
}

std::vector<at::Tensor> patch_merge_backward_cpu(const at::Tensor& gradient, const at::Tensor& x,
                                                 const at::Tensor& weight, const at::Tensor& statistics, int64_t kernel,
                                                 int64_t stride, const at::Tensor& norm_weight,
                                                 const OptionalTensor& norm_bias, double eps, bool channels_last,
                                                 at::IntArrayRef padding, bool needs_input_grad,
                                                 bool needs_parameter_grad) {
  const Merge merge = make_merge(x, weight, kernel, stride, norm_weight, norm_bias, eps, channels_last, padding);
  const char* const op = "patch_merge_backward";
  const int64_t images = merge.images, rows = merge.map.out_height, columns = merge.map.out_width;
  check_operand(op, "gradient", gradient, {images, rows, columns, merge.outputs}, x);
  check_operand(op, "statistics", statistics, {2, images, rows, columns}, x);
  TORCH_CHECK_TYPE(statistics.scalar_type() == merge.compute_type && statistics.is_contiguous(), op,
                   ": statistics must be contiguous ", merge.compute_type, ", not ", statistics.scalar_type());
  std::vector<at::Tensor> gradients(5, at::empty({0}, x.options()));
  if (gradient.numel() == 0) {
    if (needs_input_grad) gradients[0] = at::zeros(x.sizes(), x.options());
    if (!needs_parameter_grad) return gradients;
    gradients[1] = at::zeros(weight.sizes(), merge.options());
    for (size_t i = 2; i < 4; ++i) gradients[i] = at::zeros({weight.size(1)}, merge.options());
    gradients[4] = at::zeros({weight.size(0)}, merge.options());
    return gradients;
  }
  with_compute_type(kOp, merge.compute_type, [&](auto zero) {
    using T = decltype(zero);
    const auto problem = make_problem<T>(merge, statistics, true);
    const at::Tensor flat = gradient.to(weight.scalar_type()).reshape({merge.output_tokens(), merge.outputs});
    if (needs_parameter_grad) {
      const std::vector<at::Tensor> of_parameters = parameter_gradients<T>(merge, problem, flat);
      std::copy(of_parameters.begin(), of_parameters.end(), gradients.begin() + 1);
    }
    if (needs_input_grad) gradients[0] = input_gradient<T>(merge, problem, flat).to(x.scalar_type());
  });
  return gradients;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "patch_merge(Tensor x, Tensor weight, int kernel, int stride, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor? bias, float eps, bool channels_last, int[] padding) -> (Tensor, Tensor)");
  library.def(
      "patch_merge_backward(Tensor gradient, Tensor x, Tensor weight, Tensor statistics, int kernel, int stride, "
      "Tensor norm_weight, Tensor? norm_bias, float eps, bool channels_last, int[] padding, bool needs_input_grad, "
      "bool needs_parameter_grad) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("patch_merge", patch_merge_cpu);
  library.impl("patch_merge_backward", patch_merge_backward_cpu);
}

}  // namespace asvit_fast
