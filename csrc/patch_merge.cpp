// asvit_fast_C::patch_merge and its backward pass on the CPU: schemas, checks, allocation, threads and matrix products.
//
// Neighbourhoods are never there all at once, but in a backward pass of few tokens: blocks of them are copied into a
// buffer that the cache holds, normalised there (cpu/) and multiplied by torch's matrix product. Blocks, and the order
// in which their sums are added, depend on shapes only.
#include "patch_merge.h"

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
constexpr int64_t kWeightRows = 176;       // outputs whose gradients are computed together, about
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
  Dtype compute_type;             // LayerNorm's type; the products have the weight's
  Tensor x, weight, norm_weight;  // weight [outputs, features]
  OptionalTensor norm_bias;

  int64_t output_rows() const { return images * map.out_height; }
  int64_t output_tokens() const { return output_rows() * map.out_width; }

  int64_t rows_per_block() const {
    const int64_t item = compute_type == kDouble ? 8 : 4;
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
  Tensor part(const Tensor& tensor, const Block& block) const {
    return rows_of(tensor, block.begin * map.out_width, (block.end - block.begin) * map.out_width);
  }
  Tensor buffer() const { return empty({rows_per_block() * map.out_width * map.features() + kRowSlack}, compute_type); }
};

void check(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride, const Tensor& norm_weight,
           const OptionalTensor& norm_bias, Sizes padding) {
  ASVIT_FAST_CHECK(is_count(kernel, 1) && is_count(stride, 1) && is_padding(padding), "patch_merge: kernel ", kernel,
                   " and stride ", stride, " must be positive, padding ", padding,
                   " four numbers of zeros, all below 2^31");
  ASVIT_FAST_CHECK(x.dim() == 4 && weight.dim() == 2 && x.size(3) > 0 && weight.size(1) % x.size(3) == 0 &&
                       weight.size(1) / x.size(3) == kernel * kernel,
                   "patch_merge: x must be [B, H, W, C] and weight [Cout, C*", kernel, "*", kernel, "], not ",
                   x.sizes(), " and ", weight.sizes());
  scalar_type(kOp, x.scalar_type());
  scalar_type(kOp, weight.scalar_type());
  check_device_and_type(kOp, "weight", weight, x);
  check_operand(kOp, "norm_weight", norm_weight, {weight.size(1)}, x);
  check_operand(kOp, "norm_bias", norm_bias, {weight.size(1)}, x);
}

Merge make_merge(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride, const Tensor& norm_weight,
                 const OptionalTensor& norm_bias, double eps, bool channels_last, Sizes padding) {
  check(x, weight, kernel, stride, norm_weight, norm_bias, padding);
  const Neighbourhoods map = {x.size(1),
                              x.size(2),
                              x.size(3),
                              kernel,
                              stride,
                              padding[0],
                              padding[2],
                              patches_along(x.size(1), padding[0] + padding[1], kernel, stride),
                              patches_along(x.size(2), padding[2] + padding[3], kernel, stride),
                              channels_last};
  const Dtype type = x.scalar_type() == kDouble || weight.scalar_type() == kDouble ? kDouble : kFloat;
  const Tensor gain = as_contiguous(as_type(norm_weight, type));
  return {map, x.size(0), weight.size(0), eps, type, as_contiguous(x), weight, gain, parameters(norm_bias, type)};
}

// The input rows that a block's neighbourhoods touch, in LayerNorm's type; `problem` gets their address.
template <typename T>
Tensor input_rows(const Merge& merge, const Block& block, PatchMerge<T>& problem) {
  const Neighbourhoods& map = merge.map;
  const auto row = [&](int64_t output_row, int64_t offset) {  // of the input
    const int64_t inside =
        std::clamp<int64_t>(output_row % map.out_height * map.stride - map.top + offset, 0, map.height);
    return output_row / map.out_height * map.height + inside;
  };
  const int64_t begin = row(block.begin, 0), end = std::max(begin, row(block.end - 1, map.kernel));
  const int64_t row_length = map.width * map.channels;
  const Tensor rows = widened<T>(reshaped(merge.x, {end - begin, row_length}, begin * row_length));
  problem.tokens = rows.const_data_ptr<T>();
  problem.first_row = begin;
  return rows;
}

// Rows [tokens, features] of a block, in `buffer`.
template <typename T>
Tensor normalised_rows(const Merge& merge, const Block& block, PatchMerge<T> problem, const Tensor& buffer) {
  const int64_t columns = merge.map.out_width, tokens = (block.end - block.begin) * columns;
  const Tensor source = input_rows(merge, block, problem);
  ASVIT_FAST_SELECT(patch_merge_rows<T>)(problem, block.begin * columns, block.end * columns,
                                         buffer.mutable_data_ptr<T>());
  return reshaped(buffer, {tokens, merge.map.features()});
}

template <typename T>
PatchMerge<T> make_problem(const Merge& merge, const Tensor& statistics, bool differentiate) {
  T* mean = statistics.mutable_data_ptr<T>();
  return {merge.map,
          nullptr,
          0,
          merge.norm_weight.const_data_ptr<T>(),
          pointer_or_null<T>(merge.norm_bias),
          static_cast<T>(merge.eps),
          mean,
          mean + merge.output_tokens(),
          differentiate};
}

std::tuple<Tensor, Tensor> patch_merge_cpu(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride,
                                           const Tensor& norm_weight, const OptionalTensor& norm_bias,
                                           const OptionalTensor& bias, double eps, bool channels_last, Sizes padding) {
  const Merge merge = make_merge(x, weight, kernel, stride, norm_weight, norm_bias, eps, channels_last, padding);
  const auto& map = merge.map;
  const Tensor output = new_empty({merge.output_tokens(), merge.outputs}, weight.scalar_type());
  const Tensor statistics = empty({2, merge.images, map.out_height, map.out_width}, merge.compute_type);
  check_operand(kOp, "bias", bias, {merge.outputs}, x);
  const OptionalTensor offset = parameters(bias, weight.scalar_type());
  if (output.numel() > 0)
    with_compute_type(kOp, merge.compute_type, [&](auto zero) {
      using T = decltype(zero);
      const auto problem = make_problem<T>(merge, statistics, false);
      const SharedLinear layer(merge.weight, offset);
      const bool alone = merge.blocks() == 1;
      parallel_for(0, merge.blocks(), 1, [&](int64_t begin, int64_t end) {
        const Tensor buffer = merge.buffer();
        for (int64_t i = begin; i < end; ++i) {
          const Block block = merge.block(i);
          assign<T>(merge.part(output, block), layer(normalised_rows<T>(merge, block, problem, buffer), alone));
        }
      });
    });
  return {reshaped(output, {merge.images, map.out_height, map.out_width, merge.outputs}), statistics};
}

// Pieces that blocks are cut into for the gradient of the weights: of few tokens one.
int64_t weight_pieces(const Merge& merge) {
  return std::clamp<int64_t>(merge.output_tokens() / (4 * merge.outputs), 1, std::min(kPieces, merge.blocks()));
}

// The normalised rows of all blocks.
template <typename T>
std::vector<Tensor> all_rows(const Merge& merge, const PatchMerge<T>& problem) {
  std::vector<Tensor> rows(static_cast<size_t>(merge.blocks()));
  parallel_for(0, merge.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows[i] = normalised_rows<T>(merge, merge.block(i), problem, merge.buffer());
  });
  return rows;
}

// Gradient of x. Blocks that follow each other add to the same tokens: first go the even ones, then the odd ones. kept:
// all rows or none.
template <typename T>
Tensor input_gradient(const Merge& merge, const PatchMerge<T>& problem, const Tensor& gradient,
                      const std::vector<Tensor>& kept) {
  Tensor grad_x = new_empty(merge.x.sizes(), merge.compute_type);
  torch::stable::zero_(grad_x);
  const int64_t features = merge.map.features(), columns = merge.map.out_width;
  const SharedLinear layer(transposed(merge.weight), {});  // [features, outputs]
  for (int64_t parity = 0; parity < 2; ++parity) {
    const int64_t blocks = (merge.blocks() + 1 - parity) / 2;
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const Tensor buffer = merge.buffer();
      const Tensor workspace = empty({2 * (features + kRowSlack)}, merge.compute_type);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = 2 * i + parity;
        const Block block = merge.block(index);
        const Tensor rows = kept.empty() ? normalised_rows<T>(merge, block, problem, buffer) : kept[index];
        const Tensor grad_rows = widened<T>(layer(widened<T>(merge.part(gradient, block)), blocks == 1));
        ASVIT_FAST_SELECT(patch_merge_gradient<T>)(problem, block.begin * columns, block.end * columns,
                                                   rows.const_data_ptr<T>(), grad_rows.const_data_ptr<T>(),
                                                   workspace.mutable_data_ptr<T>(), grad_x.mutable_data_ptr<T>());
      }
    });
  }
  return grad_x;
}

// Adds a tensor of the same sizes; both are contiguous.
template <typename T>
void add(const Tensor& sum, const Tensor& tensor) {
  T* const to = sum.mutable_data_ptr<T>();
  const T* const from = tensor.const_data_ptr<T>();
  const int64_t count = sum.numel();
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Adds the sum of a matrix's rows to `total`.
template <typename T>
void add_rows(const Tensor& matrix, T* total) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1), stride = matrix.stride(0);
  const T* from = matrix.const_data_ptr<T>();
  std::vector<double> sums(static_cast<size_t>(columns));
  for (int64_t row = 0; row < rows; ++row, from += stride)
    for (int64_t i = 0; i < columns; ++i) sums[i] += from[i];
  for (int64_t i = 0; i < columns; ++i) total[i] += static_cast<T>(sums[i]);
}

// gradient^T x [outputs, features], x the normalised rows, and the sum of the gradient [outputs]. Blocks are added in a
// few pieces and these one after the other; columns of the gradient go apart. kept: all rows or none.
template <typename T>
std::tuple<Tensor, Tensor> parameter_products(const Merge& merge, const PatchMerge<T>& problem, const Tensor& gradient,
                                              const std::vector<Tensor>& kept) {
  const int64_t blocks = merge.blocks(), pieces = weight_pieces(merge);
  const int64_t groups = std::max<int64_t>(1, merge.outputs / kWeightRows);
  const auto multiply = pieces * groups == 1 ? multiply_alone_into : multiply_into;
  std::vector<Tensor> sums, totals;  // one by one, so that all but the first can be freed
  for (int64_t piece = 0; piece < pieces; ++piece) {
    sums.push_back(empty({merge.outputs, merge.map.features()}, merge.compute_type));
    totals.push_back(zeros({merge.outputs}, merge.compute_type));
  }
  parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    const Tensor buffer = merge.buffer();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t piece = task / groups, first = merge.outputs * (task % groups) / groups;
      const int64_t count = merge.outputs * (task % groups + 1) / groups - first, start = blocks * piece / pieces;
      const Tensor sum = rows_of(sums[piece], first, count);
      for (int64_t i = start; i < blocks * (piece + 1) / pieces; ++i) {
        const Tensor part = widened<T>(columns_of(merge.part(gradient, merge.block(i)), first, count));
        const Tensor rows = kept.empty() ? normalised_rows<T>(merge, merge.block(i), problem, buffer) : kept[i];
        multiply(sum, transposed(part), transposed(rows), {}, i > start);
        add_rows<T>(part, totals[piece].mutable_data_ptr<T>() + first);
      }
    }
  });
  for (int64_t piece = 1; piece < pieces; ++piece) {
    add<T>(sums[0], sums[piece]);
    add<T>(totals[0], totals[piece]);
  }
  return {sums[0], totals[0]};
}

// Gradients of weight, norm_weight, norm_bias and bias.
template <typename T>
std::vector<Tensor> parameter_gradients(const Merge& merge, const PatchMerge<T>& problem, const Tensor& gradient,
                                        const std::vector<Tensor>& kept) {
  const auto [sums, total] = parameter_products<T>(merge, problem, gradient, kept);
  const Tensor wide = as_contiguous(as_type(merge.weight, merge.compute_type));
  const Tensor grad_norm_weight = empty({merge.map.features()}, merge.compute_type);
  const Tensor grad_norm_bias = empty({merge.map.features()}, merge.compute_type);
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
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel(parameters, i * kFeatures, std::min((i + 1) * kFeatures, parameters.features));
  });
  return {sums, grad_norm_weight, grad_norm_bias, total};
}

std::vector<Tensor> patch_merge_backward_cpu(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                             const Tensor& statistics, int64_t kernel, int64_t stride,
                                             const Tensor& norm_weight, const OptionalTensor& norm_bias, double eps,
                                             bool channels_last, Sizes padding, bool needs_input_grad,
                                             bool needs_parameter_grad) {
  const Merge merge = make_merge(x, weight, kernel, stride, norm_weight, norm_bias, eps, channels_last, padding);
  const char* const op = "patch_merge_backward";
  const int64_t images = merge.images, rows = merge.map.out_height, columns = merge.map.out_width;
  check_operand(op, "gradient", gradient, {images, rows, columns, merge.outputs}, x);
  check_operand(op, "statistics", statistics, {2, images, rows, columns}, x);
  ASVIT_FAST_CHECK(statistics.scalar_type() == merge.compute_type && statistics.is_contiguous(), op,
                   ": statistics must be contiguous ", merge.compute_type, ", not ", statistics.scalar_type());
  std::vector<Tensor> gradients(5, empty({0}, x.scalar_type()));
  if (gradient.numel() == 0) {
    if (needs_input_grad) gradients[0] = zeros(x.sizes(), x.scalar_type());
    if (!needs_parameter_grad) return gradients;
    gradients[1] = zeros(weight.sizes(), merge.compute_type);
    for (size_t i = 2; i < 4; ++i) gradients[i] = zeros({weight.size(1)}, merge.compute_type);
    gradients[4] = zeros({weight.size(0)}, merge.compute_type);
    return gradients;
  }
  with_compute_type(kOp, merge.compute_type, [&](auto zero) {
    using T = decltype(zero);
    const auto problem = make_problem<T>(merge, statistics, true);
    const Tensor flat =
        reshaped(as_contiguous(as_type(gradient, weight.scalar_type())), {merge.output_tokens(), merge.outputs});
    std::vector<Tensor> kept;
    if (needs_parameter_grad) {
      if (weight_pieces(merge) == 1) kept = all_rows<T>(merge, problem);
      const std::vector<Tensor> of_parameters = parameter_gradients<T>(merge, problem, flat, kept);
      std::copy(of_parameters.begin(), of_parameters.end(), gradients.begin() + 1);
    }
    if (needs_input_grad) gradients[0] = as_type(input_gradient<T>(merge, problem, flat, kept), x.scalar_type());
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "patch_merge(Tensor x, Tensor weight, int kernel, int stride, Tensor norm_weight, Tensor? norm_bias, "
      "Tensor? bias, float eps, bool channels_last, int[] padding) -> (Tensor, Tensor)");
  library.def(
      "patch_merge_backward(Tensor gradient, Tensor x, Tensor weight, Tensor statistics, int kernel, int stride, "
      "Tensor norm_weight, Tensor? norm_bias, float eps, bool channels_last, int[] padding, bool needs_input_grad, "
      "bool needs_parameter_grad) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("patch_merge", TORCH_BOX(&patch_merge_cpu));
  library.impl("patch_merge_backward", TORCH_BOX(&patch_merge_backward_cpu));
}

}  // namespace asvit_fast
