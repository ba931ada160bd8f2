// asvit_fast_C::linear, linear_pack and weight_changed: schemas, checks, allocation and threads. The arithmetic is in
// cpu/.
#include "linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <cstring>
#include <string_view>
#include <vector>

#include "products.h"
#include "tensor_utils.h"

namespace asvit_fast {
namespace {

constexpr const char* kOp = "linear";
constexpr int64_t kSamples = 512;           // of a weight, about, by which it is known
constexpr int64_t kTileElements = 3 << 15;  // of x, which the second cache holds while all panels pass
constexpr int64_t kLeastTileRows = 144;     // for which a panel is read
constexpr int64_t kTasksPerThread = 4;      // so that threads end at about the same time

Panels panels_here() {
  Panels panels;
  ASVIT_FAST_SELECT(find_panels<float>)(0.f, &panels);
  return panels;
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

Matrix<float> matrix(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1)};
}

void check_matrix(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && is_count(tensor.size(0), 0) && is_count(tensor.size(1), 0), kOp, ": ", name,
                    " must be a matrix with sides below 2^31, not ", tensor.sizes());
  TORCH_CHECK_TYPE(compute_type(tensor.scalar_type()) == at::kFloat, kOp, ": ", name,
                   " must be float32, bfloat16 or float16, not ", tensor.scalar_type());
}

int64_t packed_size(int64_t inputs, int64_t outputs) { return inputs * panels_here().padded(outputs); }

at::Tensor linear_pack_cpu(const at::Tensor& weight) {
  check_matrix("weight", weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const at::Tensor wide = weight.to(at::kFloat);
  const at::Tensor packed = at::empty({packed_size(inputs, outputs)}, wide.options());
  const Panels panels = panels_here();
  const Matrix<float> transposed = matrix(wide.t());
  const auto kernel = ASVIT_FAST_SELECT(pack_panels<float>);
  const double work = static_cast<double>(inputs * panels.width);
  at::parallel_for(0, panels.count(outputs), grain_size(kElements, work), [&](int64_t begin, int64_t end) {
    kernel(transposed, inputs, outputs, begin, end, packed.mutable_data_ptr<float>());
  });
  return packed;
}

// How rows and panels are cut into tiles: enough of them for all threads, of sizes that differ little.
struct Tiling {
  int64_t row_blocks, panel_blocks;

  Tiling(int64_t rows, int64_t depth, int64_t panels) {
    const int64_t wanted = at::get_num_threads() > 1 ? kTasksPerThread * at::get_num_threads() : 1;
    row_blocks = divide_up(rows, std::clamp(kTileElements / depth, kLeastTileRows, kTileRows));
    panel_blocks = std::clamp<int64_t>(divide_up(wanted, row_blocks), 1, panels);
  }
};

void check_packed(const at::Tensor& packed, int64_t outputs, int64_t inputs) {
  TORCH_CHECK_VALUE(is_count(outputs, 1) && inputs > 0 && packed.dim() == 1 && packed.is_contiguous() &&
                        packed.scalar_type() == at::kFloat && packed.size(0) == packed_size(inputs, outputs),
                    "linear: packed is not what linear_pack makes of a weight [", outputs, ", ", inputs, "] now");
}

// A layer: its packed weight, its bias in float32 or undefined, and what follows.
struct Layer {
  at::Tensor packed, bias;
  Activation activation;
};

Linear<float> make_problem(const at::Tensor& x, const Layer& layer, const at::Tensor& residual, const at::Tensor& y) {
  return {matrix(x),
          x.size(1),
          y.size(1),
          layer.packed.const_data_ptr<float>(),
          pointer_or_null<float>(layer.bias),
          pointer_or_null<float>(residual),
          layer.activation,
          y.mutable_data_ptr<float>()};
}

// y of float32 operands, whose rows and panels are shared among threads.
void multiply(const Linear<float>& problem, int64_t rows) {
  const Panels panels = panels_here();
  const int64_t count = panels.count(problem.columns);
  const Tiling tiling(rows, problem.depth, count);
  const int64_t tiles = tiling.row_blocks * tiling.panel_blocks;
  const double work = static_cast<double>(rows * problem.depth) * static_cast<double>(problem.columns);
  const auto kernel = ASVIT_FAST_SELECT(linear_tile<float>);
  at::parallel_for(0, tiles, grain_size(kMultiplyAdds, work / tiles), [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({kScratchRows * panels.width}, at::kFloat);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiling.panel_blocks, part = i % tiling.panel_blocks;
      kernel(problem,
             {rows * block / tiling.row_blocks, rows * (block + 1) / tiling.row_blocks,
              count * part / tiling.panel_blocks, count * (part + 1) / tiling.panel_blocks},
             scratch.mutable_data_ptr<float>());
    }
  });
}

// y of 16-bit operands, which are widened a tile of rows at a time, in one thread.
void multiply_widened(const at::Tensor& x, const Layer& layer, const at::Tensor& residual, const at::Tensor& y) {
  const int64_t rows = x.size(0), tiles = divide_up(rows, kTileRows);  // one: panels are shared among threads
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a guard of the calling thread does not hold in others
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = rows * i / tiles, count = rows * (i + 1) / tiles - first;
      const at::Tensor wide_x = x.narrow(0, first, count).to(at::kFloat);
      const at::Tensor added = residual.defined() ? residual.narrow(0, first, count).to(at::kFloat) : residual;
      const at::Tensor wide_y = new_empty({count, y.size(1)}, wide_x.options());
      multiply(make_problem(wide_x, layer, added, wide_y), count);
      y.narrow(0, first, count).copy_(wide_y);
    }
  });
}

Activation parse_activation(std::string_view name) {
  TORCH_CHECK_VALUE(name == "none" || name == "gelu", "linear: activation must be none or gelu, not ", name);
  return name == "gelu" ? Activation::gelu : Activation::none;
}

std::vector<int64_t> output_sizes(const at::Tensor& x, int64_t outputs) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = outputs;
  return sizes;
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& packed, int64_t outputs, const OptionalTensor& bias,
                      const OptionalTensor& residual, std::string_view activation) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "linear: x must be [*, K], not a number");
  const std::vector<int64_t> sizes = output_sizes(x, outputs);
  const at::Tensor flat = x.reshape({-1, x.size(-1)});
  check_matrix("x", flat);
  check_packed(packed, outputs, flat.size(1));
  check_operand(kOp, "bias", bias, {outputs}, x);
  check_operand(kOp, "residual", residual, sizes, x);
  const Layer layer = {packed, parameters(bias, at::kFloat), parse_activation(activation)};
  const at::Tensor y = new_empty(sizes, x.options()), rows = y.view({flat.size(0), outputs});
  at::Tensor added = parameters(residual, x.scalar_type());
  if (added.defined()) added = added.view(rows.sizes());
  if (y.numel() == 0) return y;
  if (x.scalar_type() == at::kFloat) {
    multiply(make_problem(flat, layer, added, rows), flat.size(0));
  } else {
    multiply_widened(flat, layer, added, rows);
  }
  return y;
}

// ----------------------------------------------------------------------------------------- whether a weight has
// changed

// Distance of the numbers of a contiguous weight that are looked at: they lie in as many rows and columns as may be.
int64_t sample_distance(const at::Tensor& weight) {
  const int64_t shorter = std::min(weight.size(0), weight.size(-1));
  return std::max(shorter, weight.numel() / kSamples) + 1;
}

// Writes what a weight is known by to `known`, and says whether it was something else: its version, which autograd
// counts, its address, and some of its numbers, as changes of `weight.data` have no version.
template <typename T>
bool update_state(const at::Tensor& weight, std::vector<int64_t>& known, int64_t* state) {
  const T* numbers = static_cast<const T*>(weight.const_data_ptr());
  const int64_t distance = sample_distance(weight), count = weight.numel();
  bool changed = false;
  int64_t* next = state;
  const auto compare = [&](int64_t value) {
    changed |= *next != value;
    *next++ = value;
  };
  for (const int64_t value : known) compare(value);
  for (int64_t i = 0; i < count; i += distance) {
    T number = numbers[i];
    int64_t bits = 0;
    std::memcpy(&bits, &number, sizeof number);
    compare(bits);
  }
  return changed;
}

int64_t state_size(const at::Tensor& weight) { return 2 + divide_up(weight.numel(), sample_distance(weight)); }

bool weight_changed_cpu(const at::Tensor& weight, const at::Tensor& state) {
  TORCH_CHECK_VALUE(weight.dim() > 0 && weight.is_contiguous() && state.scalar_type() == at::kLong &&
                        state.is_contiguous() && state.numel() == state_size(weight),
                    "weight_changed: state must be int64 [", state_size(weight), "] for a contiguous weight ",
                    weight.sizes());
  std::vector<int64_t> known = {static_cast<int64_t>(weight._version()),
                                reinterpret_cast<int64_t>(weight.const_data_ptr())};
  auto* const to = static_cast<int64_t*>(state.data_ptr());
  switch (weight.element_size()) {
    case 2:
      return update_state<uint16_t>(weight, known, to);
    case 4:
      return update_state<uint32_t>(weight, known, to);
    default:
      return update_state<uint64_t>(weight, known, to);
  }
}

}  // namespace

at::Tensor pack_weight(const at::Tensor& weight) { return linear_pack_cpu(weight); }

at::Tensor multiply_packed(const at::Tensor& x, const at::Tensor& packed, int64_t outputs, const at::Tensor& bias) {
  const at::Tensor y = new_empty({x.size(0), outputs}, x.options());
  if (y.numel() > 0) multiply(make_problem(x, {packed, bias, Activation::none}, {}, y), x.size(0));
  return y;
}

TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("linear_pack(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? residual, str activation) -> Tensor");
  library.def("weight_changed(Tensor weight, Tensor(a!) state) -> bool");
  library.def("weight_state_size(Tensor weight) -> int");
}

TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("weight_changed", weight_changed_cpu);
  library.impl("weight_state_size", state_size);
  library.impl("linear_pack", linear_pack_cpu);
  library.impl("linear", linear_cpu);
}

}  // namespace asvit_fast
