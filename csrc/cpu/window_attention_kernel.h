// The entry points of windowed attention, for the namespace of the instruction set.
#pragma once

#include "cpu/window_attention_backward.h"
#include "cpu/window_attention_forward.h"

#define ASVIT_FAST_WINDOW_ATTENTION_KERNELS                                                                      \
  void window_attention_f32(const WindowAttention<float>& problem, int64_t begin, int64_t end, char* memory) {   \
    window_attention(problem, begin, end, memory);                                                               \
  }                                                                                                              \
  void window_attention_f64(const WindowAttention<double>& problem, int64_t begin, int64_t end, char* memory) {  \
    window_attention(problem, begin, end, memory);                                                               \
  }                                                                                                              \
  void window_attention_backward_f32(const WindowAttentionBackward<float>& problem, int64_t begin, int64_t end,  \
                                     char* memory) {                                                             \
    window_attention_backward(problem, begin, end, memory);                                                      \
  }                                                                                                              \
  void window_attention_backward_f64(const WindowAttentionBackward<double>& problem, int64_t begin, int64_t end, \
                                     char* memory) {                                                             \
    window_attention_backward(problem, begin, end, memory);                                                      \
  }
