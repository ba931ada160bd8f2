// asvit_fast_C::patch_embed and its backward pass on the CPU: schemas, checks, allocation and threads. The arithmetic
// is in cpu/.
#include "patch_embed.h"

#include <array>
#include <tuple>

#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "patch_embed";
constexpr int64_t kLeastTokens = 128;  // of a piece: adding up its gradients is little beside finding them
constexpr int64_t kPieces = 32;        // whatever the number of threads, they have about as many each
constexpr int64_t kPieceTokens = 1024, kMaximumPieces = 64;  // of many tokens, for many threads
constexpr double kMaximumWorkspace = 1ll << 48;              // elements

void check(const Tensor& image, const Tensor& weight, int64_t stride, int64_t dilation, Sizes padding) {
  ASVIT_FAST_CHECK(image.dim() == 4 && weight.dim() == 4 && image.size(1) == weight.size(1) &&
                       weight.size(2) == weight.size(3) && weight.numel() > 0,
                   "patch_embed: image must be [B, Cin, H, W] and weight [C, Cin, K, K], not ", image.sizes(), " and ",
                   weight.sizes());
  ASVIT_FAST_CHECK(is_count(stride, 1) && is_count(dilation, 1) && is_padding(padding) && is_count(weight.size(2), 1),
                   "patch_embed: stride ", stride, " and dilation ", dilation, " must be positive, padding ", padding,
                   " four numbers of zeros, all below 2^31");
  const int64_t span = dilation * (weight.size(2) - 1) + 1;
  ASVIT_FAST_CHECK(image.size(2) + padding[2] + padding[3] >= span && image.size(3) + padding[0] + padding[1] >= span,
                   "patch_embed: patches of ", span, " pixels do not fit the padded image ", image.sizes());
  // a thread's rows of pixels reach a block of tokens beyond the image
  const double row = static_cast<double>(image.size(3) + padding[0] + padding[1] + span + 16 * stride);
  ASVIT_FAST_CHECK(row * static_cast<double>(weight.size(1) * weight.size(2)) < kMaximumWorkspace,
                   "patch_embed: patches ", weight.sizes(), " at stride ", stride, " and padding ", padding,
                   " are too large");
  scalar_type(kOp, image.scalar_type());
  check_device_and_type(kOp, "weight", weight, image);
}

// The type that is computed in.
Dtype checked_type(const Tensor& image, const Tensor& weight, int64_t stride, int64_t dilation, Sizes padding) {
  check(image, weight, stride, dilation, padding);
  return compute_type(image.scalar_type());
}

// Operands in the type that is computed in, low precision widened once, and parameters as the kernels read them.
struct Inputs {
  Dtype type;
  Tensor image;  // [B, Cin, H, W]
  int64_t kernel, stride, dilation, channels;
  Tensor parameters;  // [Cin * K * K + 3, padded channels]: the weight, bias, the norm's weight and bias
  Sizes padding;
  bool norm;
  double eps;

  Inputs(const Tensor& image, const Tensor& weight, const OptionalTensor& bias, int64_t stride, int64_t dilation,
         Sizes padding, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps)
      : type(checked_type(image, weight, stride, dilation, padding)),
        image(as_type(image, type)),
        kernel(weight.size(-1)),
        stride(stride),
        dilation(dilation),
        channels(weight.size(0)),
        parameters(empty(
            {weight.numel() / channels + 3, (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock}, type)),
        padding(padding),
        norm(norm_weight.has_value()),
        eps(eps) {
    with_compute_type(kOp, type, [&](auto zero) { pack<decltype(zero)>(weight, {&bias, &norm_weight, &norm_bias}); });
  }

  template <typename T>
  void pack(const Tensor& weight, std::array<const OptionalTensor*, 3> vectors) const {
    const int64_t patch = parameters.size(0) - 3, padded = parameters.size(1);
    const Tensor wide = as_contiguous(as_type(weight, type));
    const T* from = wide.const_data_ptr<T>();
    T* next = parameters.mutable_data_ptr<T>();
    for (int64_t block = 0; block < padded; block += kChannelBlock) {
      const int64_t count = std::min(kChannelBlock, channels - block);
      for (int64_t i = 0; i < patch; ++i) {
        T* row = next + i * padded + block;
        for (int64_t channel = 0; channel < count; ++channel) row[channel] = from[(block + channel) * patch + i];
        std::fill(row + count, row + kChannelBlock, T(0));
      }
    }
    next += patch * padded;
    for (const OptionalTensor* vector : vectors) {
      std::fill(next, next + padded, T(0));
      check_operand(kOp, "a bias or norm parameter", *vector, {channels}, weight);
      if (*vector) {
        const Tensor one = as_contiguous(as_type(**vector, type));
        std::copy_n(one.const_data_ptr<T>(), channels, next);
      }
      next += padded;
    }
  }

  int64_t rows() const {
    return patches_along(image.size(2), padding[2] + padding[3], dilation * (kernel - 1) + 1, stride);
  }
  int64_t columns() const {
    return patches_along(image.size(3), padding[0] + padding[1], dilation * (kernel - 1) + 1, stride);
  }
  OwnedSizes output_sizes() const { return {image.size(0), rows(), columns(), channels}; }

  template <typename T>
  PatchEmbed<T> problem() const {
    const int64_t patch = parameters.size(0) - 3, padded = parameters.size(1);
    const T* weight = parameters.const_data_ptr<T>();
    const T* bias = weight + patch * padded;
    return {image.const_data_ptr<T>(),
            {image.stride(0), image.stride(1), image.stride(2), image.stride(3)},
            image.size(0),
            image.size(1),
            image.size(2),
            image.size(3),
            kernel,
            stride,
            dilation,
            padding[0],
            padding[2],
            rows(),
            columns(),
            channels,
            weight,
            bias,
            norm ? bias + padded : nullptr,
            norm ? bias + 2 * padded : nullptr,
            static_cast<T>(eps)};
  }
};

// Multiply-adds of one row of tokens.
template <typename T>
double row_work(const PatchEmbed<T>& problem) {
  return static_cast<double>(problem.columns) * problem.patch() * problem.padded();
}

// The tokens [B, Ho, Wo, C] and, if it is to be saved for the backward pass, the output of the convolution (else
// empty).
std::tuple<Tensor, Tensor> patch_embed_cpu(const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                           int64_t stride, int64_t dilation, Sizes padding, double eps, Dtype dtype,
                                           bool save_conv_output) {
  const Inputs inputs(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps);
  const OwnedSizes sizes = inputs.output_sizes();
  const Tensor output = new_empty(sizes, inputs.type);
  const Tensor conv_output = save_conv_output ? new_empty(sizes, inputs.type) : empty({0}, inputs.type);
  with_compute_type(kOp, inputs.type, [&](auto zero) {
    using T = decltype(zero);
    const PatchEmbed<T> problem = inputs.problem<T>();
    if (output.numel() == 0) return;
    const auto kernel = ASVIT_FAST_SELECT(patch_embed<T>);
    T* to = output.mutable_data_ptr<T>();
    T* conv_to = save_conv_output ? conv_output.mutable_data_ptr<T>() : nullptr;
    parallel_with_memory<PatchEmbedMemory<T>>(
        problem, problem.batch * problem.rows, row_work(problem),
        [&](int64_t begin, int64_t end, char* memory) { kernel(problem, to, conv_to, begin, end, memory); });
  });
  return {as_type(output, dtype), conv_output};
}

// Fixed by the shapes alone, so that sums do not depend on the number of threads.
template <typename T>
int64_t piece_count(const PatchEmbed<T>& problem) {
  const int64_t rows = problem.batch * problem.rows, tokens = rows * problem.columns;
  const int64_t few = std::min(tokens / kLeastTokens, kPieces), many = std::min(tokens / kPieceTokens, kMaximumPieces);
  return std::clamp<int64_t>(std::max(few, many), 1, rows);
}

// Gradients of the pieces [pieces, Cin * K * K + 3, padded channels] added up, in the shapes and types of the
// parameters; empty for those that are missing.
std::tuple<Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& sums, const Tensor& weight,
                                                  std::array<OptionalTensor, 3> vectors) {
  const Tensor sum = sum_first(sums);  // [Cin * K * K + 3, padded channels]
  const int64_t channels = weight.size(0), patch = sum.size(0) - 3, padded = sum.size(1);
  const Tensor grad_weight = empty(weight.sizes(), weight.scalar_type());
  copy_to(strided(grad_weight, {patch, channels}, {1, patch}), strided(sum, {patch, channels}, {padded, 1}));
  const auto row = [&](int64_t index) {
    const OptionalTensor& vector = vectors[index];
    if (!vector) return empty({0}, sum.scalar_type());
    const Tensor gradient = empty({channels}, vector->scalar_type());  // its own, as outputs must not share memory
    copy_to(gradient, strided(sum, {channels}, {1}, (patch + index) * padded));
    return gradient;
  };
  return {grad_weight, row(0), row(1), row(2)};
}

// Gradients of the convolution's output [B, Ho, Wo, C], the weight, the bias, the norm's weight and bias: empty unless
// needed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward_cpu(
    const Tensor& gradient, const Tensor& image, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, int64_t stride, int64_t dilation, Sizes padding,
    double eps, const Tensor& conv_output, bool needs_conv_output_grad, bool needs_parameter_grad) {
  const Inputs inputs(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps);
  const OwnedSizes sizes = inputs.output_sizes();
  ASVIT_FAST_CHECK(gradient.sizes().equals(sizes) && (conv_output.numel() == 0 || conv_output.sizes().equals(sizes)),
                   "patch_embed_backward: gradient ", gradient.sizes(), " must have the output's shape");
  check_device_and_type("patch_embed_backward", "gradient", gradient, image);
  check_device_and_type("patch_embed_backward", "conv_output", conv_output, image);
  const Tensor wide = as_contiguous(as_type(gradient, inputs.type)),
               conv_values = as_contiguous(as_type(conv_output, inputs.type));
  const auto nothing = [&] { return empty({0}, inputs.type); };  // each its own, as outputs must not share memory
  const Tensor grad_conv_output = needs_conv_output_grad ? new_empty(sizes, inputs.type) : nothing();
  OptionalTensor sums;
  with_compute_type(kOp, inputs.type, [&](auto zero) {
    using T = decltype(zero);
    const PatchEmbed<T> problem = inputs.problem<T>();
    const int64_t pieces = gradient.numel() > 0 ? piece_count(problem) : 1;
    if (needs_parameter_grad) sums = zeros({pieces, problem.patch() + 3, problem.padded()}, inputs.type);
    if (gradient.numel() == 0) return;
    const auto kernel = ASVIT_FAST_SELECT(patch_embed_backward<T>);
    const PatchEmbedBackward<T> backward = {problem,
                                            wide.const_data_ptr<T>(),
                                            conv_values.numel() > 0 ? conv_values.const_data_ptr<T>() : nullptr,
                                            needs_conv_output_grad ? grad_conv_output.mutable_data_ptr<T>() : nullptr,
                                            mutable_or_null<T>(sums),
                                            pieces};
    const double work = 2 * row_work(problem) * problem.batch * problem.rows / pieces;
    parallel_with_memory<PatchEmbedMemory<T>>(backward, pieces, work, [&](int64_t begin, int64_t end, char* memory) {
      kernel(backward, begin, end, memory);
    });
  });
  if (!needs_parameter_grad) return {grad_conv_output, nothing(), nothing(), nothing(), nothing()};
  return std::tuple_cat(std::make_tuple(grad_conv_output), unpack(*sums, weight, {bias, norm_weight, norm_bias}));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def(
      "patch_embed(Tensor image, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int stride, int "
      "dilation, int[] padding, float eps, ScalarType dtype, bool save_conv_output) -> (Tensor, Tensor)");
  library.def(
      "patch_embed_backward(Tensor gradient, Tensor image, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? "
      "norm_bias, int stride, int dilation, int[] padding, float eps, Tensor conv_output, bool needs_conv_output_grad, "
      "bool "
      "needs_parameter_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("patch_embed", TORCH_BOX(&patch_embed_cpu));
  library.impl("patch_embed_backward", TORCH_BOX(&patch_embed_backward_cpu));
}

}  // namespace asvit_fast
