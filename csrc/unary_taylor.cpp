// asvit_fast_C::gelu_taylor, tanh_taylor, square_taylor: schemas, checks, allocation, threads and streams. The
// arithmetic is in cpu/ and cuda/.
#include "unary_taylor.h"

#include <string>

#include "taylor_tensor.h"

namespace asvit_fast {
namespace {

UnaryFunction gelu(const std::string& approximate) {
  ASVIT_FAST_CHECK(approximate == "none" || approximate == "tanh",
                   "gelu_taylor: approximate must be 'none' or 'tanh', not '", approximate, "'");
  return approximate == "tanh" ? UnaryFunction::gelu_tanh : UnaryFunction::gelu;
}

void check(const char* op, const Tensor& x, const OptionalTensor& bias) {
  check_orders(op, x);
  check_channels(op, "bias", bias, x);
}

// input, output: [orders + 1, ..., C], contiguous; bias: [C] or none; of the type T or, for void, of any type
template <typename T>
TaylorRows<T> taylor_rows(const Tensor& input, const Tensor& output, const OptionalTensor& bias) {
  return {static_cast<const T*>(input.const_data_ptr()),
          static_cast<T*>(output.mutable_data_ptr()),
          input.numel() / input.size(0),
          static_cast<int>(input.size(0)) - 1,
          pointer_or_null<T>(bias),
          bias ? bias->size(0) : 1};
}

Tensor apply_cpu(const char* op, UnaryFunction function, const Tensor& x, const OptionalTensor& bias) {
  check(op, x, bias);
  return run_taylor_cpu(op, x, [&](auto zero, const Tensor& input, const Tensor& output) {
    using T = decltype(zero);
    const OptionalTensor channels = parameters(bias, input.scalar_type());
    const TaylorRows<T> rows = taylor_rows<T>(input, output, channels);
    const auto kernel = ASVIT_FAST_SELECT(unary_taylor<T>);
    parallel_for(0, rows.count, grain_size(kElements, 1),
                 [&](int64_t begin, int64_t end) { kernel(rows, begin, end, function); });
  });
}

Tensor gelu_taylor_cpu(const Tensor& x, const std::string& approximate, const OptionalTensor& bias) {
  return apply_cpu("gelu_taylor", gelu(approximate), x, bias);
}

Tensor tanh_taylor_cpu(const Tensor& x) { return apply_cpu("tanh_taylor", UnaryFunction::tanh, x, {}); }

Tensor square_taylor_cpu(const Tensor& x) { return apply_cpu("square_taylor", UnaryFunction::square, x, {}); }

#ifdef ASVIT_FAST_CUDA
Tensor apply_gpu(const char* op, UnaryFunction function, const Tensor& x, const OptionalTensor& bias) {
  check(op, x, bias);
  const OptionalTensor channels = parameters(bias, compute_type(x.scalar_type()));
  const auto launch = [&](const Tensor& input, const Tensor& output, ScalarType type, void* stream) {
    unary_taylor_cuda(taylor_rows<void>(input, output, channels), function, type, stream);
  };
  return run_taylor_cuda(op, x, launch);
}

Tensor gelu_taylor_gpu(const Tensor& x, const std::string& approximate, const OptionalTensor& bias) {
  return apply_gpu("gelu_taylor", gelu(approximate), x, bias);
}

Tensor tanh_taylor_gpu(const Tensor& x) { return apply_gpu("tanh_taylor", UnaryFunction::tanh, x, {}); }

Tensor square_taylor_gpu(const Tensor& x) { return apply_gpu("square_taylor", UnaryFunction::square, x, {}); }
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(asvit_fast_C, library) {
  library.def("gelu_taylor(Tensor x, str approximate, Tensor? bias=None) -> Tensor");
  library.def("tanh_taylor(Tensor x) -> Tensor");
  library.def("square_taylor(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CPU, library) {
  library.impl("gelu_taylor", TORCH_BOX(&gelu_taylor_cpu));
  library.impl("tanh_taylor", TORCH_BOX(&tanh_taylor_cpu));
  library.impl("square_taylor", TORCH_BOX(&square_taylor_cpu));
}

#ifdef ASVIT_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(asvit_fast_C, CUDA, library) {
  library.impl("gelu_taylor", TORCH_BOX(&gelu_taylor_gpu));
  library.impl("tanh_taylor", TORCH_BOX(&tanh_taylor_gpu));
  library.impl("square_taylor", TORCH_BOX(&square_taylor_gpu));
}
#endif

}  // namespace asvit_fast
