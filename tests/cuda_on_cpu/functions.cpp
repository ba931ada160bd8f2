// The functions of csrc/cuda under C names, for ctypes.
#include <cuda_runtime.h>

#include "layer_norm_taylor.h"
#include "softmax_taylor.h"
#include "unary_taylor.h"
#include "window_attention_taylor.h"

using namespace asvit_fast;

extern "C" {

void take_turns_backwards(bool backwards) { cuda_on_cpu::backwards = backwards; }

// input, output: [orders + 1, count, size]
void layer_norm_taylor(const void* input, void* output, int64_t count, int64_t size, int orders, ScalarType type,
                       const void* weight, const void* bias, double eps) {
  layer_norm_taylor_cuda({input, output, count, size, orders}, weight, bias, eps, type, nullptr);
}

void softmax_taylor(const void* input, void* output, int64_t count, int64_t size, int orders, ScalarType type) {
  softmax_taylor_cuda({input, output, count, size, orders}, type, nullptr);
}

// input, output: [orders + 1, count]; bias: [channels] or null
void unary_taylor(const void* input, void* output, int64_t count, int orders, ScalarType type, const void* bias,
                  int64_t channels, UnaryFunction function) {
  unary_taylor_cuda({input, output, count, orders, bias, channels}, function, type, nullptr);
}
}

// q, k, v: [orders + 1, batch, height, width, heads, head_dim] at strides[0 to 2]; window: rows, columns, their shifts
template <typename T>
void attention(const T* const* operands, const AttentionStrides* strides, const int64_t* sizes, const int64_t* window,
               const T* bias, double scale, T* output) {
  const auto operand = [&](int i) { return AttentionOperand<T>{operands[i], strides[i]}; };
  const WindowAxis rows{sizes[2], window[0], window[2]}, columns{sizes[3], window[1], window[3]};
  const int orders = static_cast<int>(sizes[0]) - 1;
  const WindowAttentionTaylor<T> problem{operand(0), operand(1), operand(2), bias,     output, rows,
                                         columns,    sizes[1],   sizes[4],   sizes[5], orders, static_cast<T>(scale)};
  window_attention_taylor_cuda(problem, nullptr);
}

extern "C" {

void window_attention_taylor_f32(const float* const* operands, const AttentionStrides* strides, const int64_t* sizes,
                                 const int64_t* window, const float* bias, double scale, float* output) {
  attention(operands, strides, sizes, window, bias, scale, output);
}

void window_attention_taylor_f64(const double* const* operands, const AttentionStrides* strides, const int64_t* sizes,
                                 const int64_t* window, const double* bias, double scale, double* output) {
  attention(operands, strides, sizes, window, bias, scale, output);
}
}
