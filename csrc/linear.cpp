// asvit_fast_C::linear, norm_linear and linear_pack: schemas, checks, allocation and threads. The arithmetic is in
// cpu/.
#include "linear.h"

#include <string>

#include "products.h"
#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "linear";
constexpr int64_t kTileElements = 3 << 15;  // of x, which the second cache holds while all panels pass
constexpr int64_t kLeastTileRows = 144;     // for which a panel is read
constexpr int64_t kTasksPerThread = 4;      // so that threads end at about the same time

Panels panels_here() {
  Panels panels;
  ASVIT_FAST_SELECT(find_panels<float>)(0.f, &panels);
  return panels;
}

Matrix<float> matrix(const Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1)};
}

void check_matrix(const char* name, const Tensor& tensor) {
  ASVIT_FAST_CHECK(tensor.dim() == 2 && is_count(tensor.size(0), 0) && is_count(tensor.size(1), 0), kOp, ": ", name,
                   " must be a matrix with sides below 2^31, not ", tensor.sizes());
  ASVIT_FAST_CHECK(compute_type(tensor.scalar_type()) == kFloat, kOp, ": ", name,
                   " must be float32, bfloat16 or float16, not ", tensor.scalar_type());
}

int64_t packed_size(int64_t inputs, int64_t outputs) { return inputs * panels_here().padded(outputs); }

// Whether the processor multiplies pairs of bfloat16 numbers, and a sum consists of pairs.
bool takes_pairs(Dtype type, int64_t inputs) {
  return active_isa() == Isa::avx512bf16 && type == kBFloat16 && inputs % 2 == 0;
}

// A matrix of pairs, as float stands for them.
Matrix<float> pairs_of(const Tensor& matrix) {
  return {static_cast<const float*>(matrix.const_data_ptr()), matrix.stride(0) / 2, 1};
}

// Packed pairs are bfloat16, all others float32.
Tensor linear_pack_cpu(const Tensor& weight) {
  check_matrix("weight", weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const bool pairs = takes_pairs(weight.scalar_type(), inputs);
  const int64_t depth = pairs ? inputs / 2 : inputs;
  const Tensor source = pairs ? as_contiguous(weight) : as_type(weight, kFloat);
  const Tensor packed = empty({packed_size(inputs, outputs)}, source.scalar_type());
  const Panels panels = panels_here();
  const Matrix<float> rows = pairs ? pairs_of(source) : matrix(source), from = {rows.data, rows.column, rows.row};
  const auto kernel = ASVIT_FAST_SELECT(pack_panels<float>);
  const double work = static_cast<double>(depth * panels.width);
  parallel_for(0, panels.count(outputs), grain_size(kElements, work), [&](int64_t begin, int64_t end) {
    kernel(from, depth, outputs, begin, end, static_cast<float*>(packed.mutable_data_ptr()));
  });
  return packed;
}

// How rows and panels are cut into tiles: enough of them for all threads, of sizes that differ little.
struct Tiling {
  int64_t row_blocks, panel_blocks;

  Tiling(int64_t rows, int64_t depth, int64_t panels) {
    const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? kTasksPerThread * threads : 1;
    row_blocks = divide_up(rows, std::clamp(kTileElements / depth, kLeastTileRows, kTileRows));
    if (row_blocks >= threads) row_blocks = std::min(divide_up(row_blocks, threads) * threads, rows);
    panel_blocks = std::clamp<int64_t>(divide_up(wanted, row_blocks), 1, panels);
  }
};

void check_packed(const Tensor& packed, int64_t outputs, const Tensor& x) {
  const int64_t inputs = x.size(1);
  const Dtype type = takes_pairs(x.scalar_type(), inputs) ? kBFloat16 : kFloat;
  ASVIT_FAST_CHECK(is_count(outputs, 1) && inputs > 0 && packed.dim() == 1 && packed.is_contiguous() &&
                       packed.scalar_type() == type && packed.size(0) == packed_size(inputs, outputs),
                   "linear: packed is not what linear_pack makes of a weight [", outputs, ", ", inputs, "] of ",
                   x.scalar_type(), " now");
}

// A layer: its packed weight, its bias in float32, and what follows or comes before.
struct Layer {
  Tensor packed;
  OptionalTensor bias;
  Activation activation;
  OptionalTensor norm_weight, norm_bias;  // in float32; none: no norm
  double eps = 0;
};

Linear<float> make_problem(const Tensor& x, const Layer& layer, const OptionalTensor& residual, const Tensor& y) {
  const bool pairs = layer.packed.scalar_type() == kBFloat16;
  return {pairs ? pairs_of(x) : matrix(x),
          pairs ? x.size(1) / 2 : x.size(1),
          y.size(1),
          static_cast<const float*>(layer.packed.const_data_ptr()),
          pointer_or_null<float>(layer.bias),
          residual ? residual->const_data_ptr() : nullptr,
          layer.activation,
          y.mutable_data_ptr(),
          pairs,
          {pointer_or_null<float>(layer.norm_weight), pointer_or_null<float>(layer.norm_bias),
           static_cast<float>(layer.eps)}};
}

// y of operands as the kernel takes them; rows and panels are shared among threads.
void multiply(const Linear<float>& problem, int64_t rows) {
  const Panels panels = panels_here();
  const int64_t count = panels.count(problem.columns);
  const Tiling tiling(rows, problem.depth, count);
  const int64_t tiles = tiling.row_blocks * tiling.panel_blocks;
  const double work = static_cast<double>(rows * problem.depth) * static_cast<double>(problem.columns);
  const auto kernel = ASVIT_FAST_SELECT(linear_tile<float>);
  parallel_for(0, tiles, grain_size(kMultiplyAdds, work / tiles), [&](int64_t begin, int64_t end) {
    const Tensor scratch = empty({panels.scratch_rows * panels.width}, kFloat);
    const int64_t most_rows = problem.norm.weight ? divide_up(rows, tiling.row_blocks) : 0;
    const Tensor normalised = empty({normalised_size(most_rows, problem.depth)}, kFloat);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiling.panel_blocks, part = i % tiling.panel_blocks;
      kernel(problem,
             {rows * block / tiling.row_blocks, rows * (block + 1) / tiling.row_blocks,
              count * part / tiling.panel_blocks, count * (part + 1) / tiling.panel_blocks},
             scratch.mutable_data_ptr<float>(), normalised.mutable_data_ptr<float>());
    }
  });
}

// y of 16-bit operands, which are widened a tile of rows at a time, in one thread.
void multiply_widened(const Tensor& x, const Layer& layer, const OptionalTensor& residual, const Tensor& y) {
  const int64_t rows = x.size(0), tiles = divide_up(rows, kTileRows);  // one: panels are shared among threads
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = rows * i / tiles, count = rows * (i + 1) / tiles - first;
      const Tensor wide_x = widened<float>(rows_of(x, first, count));
      OptionalTensor added;
      if (residual) added = widened<float>(rows_of(*residual, first, count));
      const Tensor wide_y = new_empty({count, y.size(1)}, kFloat);
      multiply(make_problem(wide_x, layer, added, wide_y), count);
      assign<float>(rows_of(y, first, count), wide_y);
    }
  });
}

// In float32, by our own conversion where it needs one: torch's takes as long as a small product.
OptionalTensor wide_vector(const OptionalTensor& vector) {
  if (!vector || vector->scalar_type() == kDouble || !vector->is_contiguous()) return parameters(vector, kFloat);
  return reshaped(widened<float>(reshaped(*vector, {1, vector->numel()})), {vector->numel()});
}

Activation parse_activation(const std::string& name) {
  ASVIT_FAST_CHECK(name == "none" || name == "gelu", "linear: activation must be none or gelu, not ", name);
  return name == "gelu" ? Activation::gelu : Activation::none;
}

// x [*, K] as a matrix.
Tensor flattened(const Tensor& x) {
  if (x.dim() == 2) return x;
  const int64_t columns = x.size(-1),
                rows = columns > 0 ? x.numel() / columns : product(x.sizes().slice(0, x.dim() - 1));
  return x.is_contiguous() ? reshaped(x, {rows, columns}) : torch::stable::reshape(x, {rows, columns});
}

// x [*, K] -> [*, outputs], of a layer whose parts fit.
Tensor apply(const Tensor& x, const Layer& layer, int64_t outputs, const OptionalTensor& residual) {
  OwnedSizes sizes = x.sizes().vec();
  sizes.back() = outputs;
  const Tensor flat = flattened(x);
  check_matrix("x", flat);
  check_packed(layer.packed, outputs, flat);
  check_operand(kOp, "residual", residual, sizes, x);
  const Dtype type = x.scalar_type();
  const Tensor y = new_empty(sizes, type), rows = reshaped(y, {flat.size(0), outputs});
  OptionalTensor added = parameters(residual, type);
  if (added) added = reshaped(*added, rows.sizes());
  if (y.numel() == 0) return y;
  const bool pairs = layer.packed.scalar_type() == kBFloat16, whole = flat.stride(1) == 1;
  if (type == kFloat || pairs) {
    const bool fits = pairs ? whole && flat.stride(0) % 2 == 0 : whole || !layer.norm_weight;
    multiply(make_problem(fits ? flat : as_contiguous(flat), layer, added, rows), flat.size(0));
  } else {
    multiply_widened(whole ? flat : as_contiguous(flat), layer, added, rows);
  }
  return y;
}

Tensor linear_cpu(const Tensor& x, const Tensor& packed, int64_t outputs, const OptionalTensor& bias,
                  const OptionalTensor& residual, const std::string& activation) {
  ASVIT_FAST_CHECK(x.dim() >= 1, "linear: x must be [*, K], not a number");
  check_operand(kOp, "bias", bias, {outputs}, x);
  const Activation chosen = parse_activation(activation);
  return apply(x, {packed, wide_vector(bias), chosen, std::nullopt, std::nullopt}, outputs, residual);
}

Tensor norm_linear_cpu(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                       const Tensor& packed, int64_t outputs, const OptionalTensor& bias,
                       const std::string& activation) {
  ASVIT_FAST_CHECK(x.dim() >= 1, "norm_linear: x must be [*, K], not a number");
  constexpr const char* op = "norm_linear";
  check_operand(op, "norm_weight", norm_weight, {x.size(-1)}, x);
  check_operand(op, "norm_bias", norm_bias, {x.size(-1)}, x);
  check_operand(op, "bias", bias, {outputs}, x);
  const Activation chosen = parse_activation(activation);
  return apply(x, {packed, wide_vector(bias), chosen, wide_vector(norm_weight), wide_vector(norm_bias), eps}, outputs,
               std::nullopt);
}

}  // namespace

Tensor pack_weight(const Tensor& weight) { return linear_pack_cpu(weight); }

Tensor multiply_packed(const Tensor& x, const Tensor& packed, int64_t outputs, const OptionalTensor& bias) {
  const Tensor y = new_empty({x.size(0), outputs}, x.scalar_type());
  if (y.numel() > 0)
    multiply(make_problem(x, {packed, bias, Activation::none, std::nullopt, std::nullopt}, {}, y), x.size(0));
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("linear_pack(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? residual, str activation) -> Tensor");
  library.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor packed, int outputs, "
      "Tensor? bias, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("linear_pack", TORCH_BOX(&linear_pack_cpu));
  library.impl("linear", TORCH_BOX(&linear_cpu));
  library.impl("norm_linear", TORCH_BOX(&norm_linear_cpu));
}

}  // namespace asvit_fast
