// Gradients of parameters, sample by sample, and their Gram matrix, on the CPU. No torch header.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/for_each_isa.h"

namespace asvit_fast {

// Rows [samples, count] that are `distance` numbers apart.
template <typename T>
struct SampleRows {
  const T* rows;
  int64_t samples, count, distance;
};

constexpr int64_t kPanelBytes = 256;  // of inputs, which take their turn together

// What the gradient g_b^T x_b of a Linear's weight [outputs, inputs] is made of, for every sample b: x
// [samples, tokens, inputs] and the gradient of the layer's output, [samples, tokens, outputs], contiguous.
template <typename T>
struct WeightSamples {
  const T *x, *gradient;
  int64_t samples, tokens, inputs, outputs;

  static constexpr int64_t kPanel = kPanelBytes / static_cast<int64_t>(sizeof(T));  // inputs
  static constexpr int64_t kVector = 64 / static_cast<int64_t>(sizeof(T));          // of any instruction set's vectors
  static int64_t padded(int64_t width) { return (width + kVector - 1) / kVector * kVector; }
  int64_t row_numbers() const { return padded(inputs) * outputs; }
};

// A part of a weight; at most kPanelBytes of inputs.
struct WeightPart {
  int64_t input, end_input, output, end_output;
};

constexpr int64_t kPanelTokens = 256;     // of a sample that are packed at a time
constexpr int64_t kConverted = 256;       // numbers of a row that are there in double precision at a time
constexpr int64_t kRowBytes = 1 << 18;    // of all samples' gradients of a part: the second cache holds them
constexpr int64_t kLeastPartOutputs = 8;  // for which inputs are packed

constexpr int64_t kGramBlock = 4;  // rows of a register block

inline int64_t padded_samples(int64_t samples) { return (samples + kGramBlock - 1) / kGramBlock * kGramBlock; }

// A thread's memory.
struct GramMemory {
  double* converted;  // [padded_samples, kConverted]

  GramMemory(int64_t samples, Arena& arena) : converted(arena.take<double>(padded_samples(samples) * kConverted)) {}
};

template <typename T>
struct WeightGramMemory {
  GramMemory gram;
  T *rows, *panel;  // [samples, outputs, panel], [kPanelTokens, panel]

  WeightGramMemory(int64_t samples, int64_t outputs, Arena& arena)
      : gram(samples, arena),
        rows(arena.take<T>(samples * outputs * WeightSamples<T>::kPanel)),
        panel(arena.take<T>(kPanelTokens * WeightSamples<T>::kPanel)) {}
};

// LayerNorm's x and the gradient of its output, [samples, tokens, channels], contiguous, and the mean and the inverse
// standard deviation of each token.
template <typename T>
struct NormSamples {
  const T *x, *gradient, *mean, *inverse_std;
  int64_t tokens, channels;
};

// add_gram: adds the inner products of all rows to the lower triangle of gram [samples, samples]. What is above the
// diagonal may be written to.
//
// add_weight_gram: the same for the gradients of a part of a weight.
//
// sample_weight_row: one sample's gradient of a whole weight, row_numbers() numbers in an order of their own, some of
// them zeros. `panel` has room for kPanelTokens of a panel.
//
// norm_weight_rows: gradients [samples, channels] of LayerNorm's weight, of samples `begin` <= b < `end`.
ASVIT_FAST_FOR_EACH_ISA(add_gram, const SampleRows<T>& rows, const GramMemory& memory, double* gram)
ASVIT_FAST_FOR_EACH_ISA(add_weight_gram, const WeightSamples<T>& problem, const WeightPart& part,
                        const WeightGramMemory<T>& memory, double* gram)
ASVIT_FAST_FOR_EACH_ISA(sample_weight_row, const WeightSamples<T>& problem, int64_t sample, T* panel, T* row)
ASVIT_FAST_FOR_EACH_ISA(norm_weight_rows, const NormSamples<T>& problem, int64_t begin, int64_t end, T* rows)

}  // namespace asvit_fast
