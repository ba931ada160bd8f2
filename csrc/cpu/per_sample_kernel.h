// Gradients of parameters, sample by sample, and their Gram matrix, for one instruction set.
#pragma once

#include "cpu/small_matmul.h"
#include "per_sample.h"

namespace asvit_fast {
namespace {

// --------------------------------------------------------------------------- Gram matrix

constexpr int kGramColumns = kWideRegisters ? 4 : 2;

// A vector of doubles from as many numbers.
inline Vector<double> load_double(const double* from) { return load<double>(from); }
inline Vector<double> load_double(const float* from) {
  typename Part<float, ASVIT_FAST_VECTOR_BYTES / 2>::Type numbers;
  std::memcpy(&numbers, from, sizeof numbers);
  return __builtin_convertvector(numbers, Vector<double>);
}

// `count` numbers of each row as doubles, in whole vectors: zeros behind them, and as further rows.
template <typename T>
void convert_rows(const SampleRows<T>& rows, int64_t first, int64_t count, double* to) {
  for (int64_t row = 0; row < padded_samples(rows.samples); ++row, to += kConverted) {
    const T* from = rows.rows + row * rows.distance + first;
    const int64_t there = row < rows.samples ? count : 0;
    int64_t i = 0;
    for (; i + kLanes<double> <= there; i += kLanes<double>) store<double>(to + i, load_double(from + i));
    for (; i < there; ++i) to[i] = from[i];
    for (; i % kLanes<double> != 0 || i < count; ++i) to[i] = 0;
  }
}

// Rows i and following with rows j and following.
inline void add_gram_block(const double* rows, int64_t vectors, int64_t i, int64_t j, int64_t samples, double* gram) {
  Vector<double> sum[kGramBlock][kGramColumns] = {};
  const double *left = rows + i * kConverted, *right = rows + j * kConverted;
  for (int64_t k = 0; k < vectors; ++k, left += kLanes<double>, right += kLanes<double>) {
    Vector<double> b[kGramColumns];
#pragma GCC unroll 4
    for (int column = 0; column < kGramColumns; ++column) b[column] = load<double>(right + column * kConverted);
#pragma GCC unroll 4
    for (int row = 0; row < kGramBlock; ++row) {
      const Vector<double> a = load<double>(left + row * kConverted);
#pragma GCC unroll 4
      for (int column = 0; column < kGramColumns; ++column) sum[row][column] += a * b[column];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kGramBlock; ++row)
#pragma GCC unroll 4
    for (int column = 0; column < kGramColumns; ++column)
      if (i + row < samples && j + column < samples)
        gram[(i + row) * samples + j + column] += total<double>(sum[row][column]);
}

// --------------------------------------------------------------------------- Linear

// `width` numbers of each row of x, zeros behind them: to [tokens][padded].
template <typename T>
void pack_tokens(const T* x, int64_t tokens, int64_t distance, int64_t width, int64_t padded, T* to) {
  for (int64_t token = 0; token < tokens; ++token, x += distance, to += padded) {
    std::memcpy(to, x, width * sizeof(T));
    for (int64_t i = width; i < padded; ++i) to[i] = T(0);
  }
}

// The gradient of one sample: rows [outputs][padded].
template <typename T>
void weight_rows(const WeightSamples<T>& problem, const WeightPart& part, int64_t sample, int64_t padded, T* panel,
                 T* rows) {
  const int64_t width = part.end_input - part.input, outputs = part.end_output - part.output;
  const bool whole = width == padded && problem.inputs == width;  // x lies as a panel does
  for (int64_t token = 0; token < problem.tokens; token += kPanelTokens) {
    const int64_t left = problem.tokens - token, depth = left < kPanelTokens ? left : kPanelTokens;
    const int64_t first = sample * problem.tokens + token;
    const T* x = problem.x + first * problem.inputs + part.input;
    if (!whole) pack_tokens(x, depth, problem.inputs, width, padded, panel);
    multiply_wide(Product<T>{problem.gradient + first * problem.outputs + part.output, 1, problem.outputs,
                             whole ? x : panel, padded, token == 0 ? nullptr : rows, padded, rows, padded},
                  outputs, padded, depth);
  }
}

// --------------------------------------------------------------------------- LayerNorm

// Adds the sums over tokens begin <= t < end of a sample for channels from c on.
template <int vectors, typename T>
inline void add_norm_rows(const NormSamples<T>& problem, int64_t sample, int64_t begin, int64_t end, int64_t c, T* to) {
  Vector<T> sum[vectors] = {};
  const int64_t tokens = sample * problem.tokens, channels = problem.channels;
  for (int64_t i = tokens + begin; i < tokens + end; ++i) {
    const T *x = problem.x + i * channels + c, *gradient = problem.gradient + i * channels + c;
    const T mean = problem.mean[i], scale = problem.inverse_std[i];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sum[v] += load<T>(gradient + v * kLanes<T>) * ((load<T>(x + v * kLanes<T>) - mean) * scale);
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    T* const at = to + c + v * kLanes<T>;
    store<T>(at, load<T>(at) + sum[v]);
  }
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void add_gram(const SampleRows<T>& rows, const GramMemory& memory, double* gram) {
  const int64_t samples = rows.samples;
  for (int64_t first = 0; first < rows.count; first += kConverted) {
    const int64_t left = rows.count - first, count = left < kConverted ? left : kConverted;
    convert_rows(rows, first, count, memory.converted);
    const int64_t vectors = (count + kLanes<double> - 1) / kLanes<double>;
    for (int64_t i = 0; i < samples; i += kGramBlock)
      for (int64_t j = 0; j < i + kGramBlock && j < samples; j += kGramColumns)
        add_gram_block(memory.converted, vectors, i, j, samples, gram);
  }
}

template <typename T>
void add_weight_gram(const WeightSamples<T>& problem, const WeightPart& part, const WeightGramMemory<T>& memory,
                     double* gram) {
  const int64_t padded = WeightSamples<T>::padded(part.end_input - part.input);
  const int64_t count = (part.end_output - part.output) * padded;
  for (int64_t sample = 0; sample < problem.samples; ++sample)
    weight_rows(problem, part, sample, padded, memory.panel, memory.rows + sample * count);
  add_gram(SampleRows<T>{memory.rows, problem.samples, count, count}, memory.gram, gram);
}

template <typename T>
void sample_weight_row(const WeightSamples<T>& problem, int64_t sample, T* panel, T* row) {
  constexpr int64_t width = WeightSamples<T>::kPanel;
  for (int64_t input = 0; input < problem.inputs; input += width) {
    const int64_t end = input + width < problem.inputs ? input + width : problem.inputs;
    const int64_t padded = WeightSamples<T>::padded(end - input);
    weight_rows(problem, {input, end, 0, problem.outputs}, sample, padded, panel, row);
    row += padded * problem.outputs;
  }
}

template <typename T>
void norm_weight_rows(const NormSamples<T>& problem, int64_t begin, int64_t end, T* rows) {
  constexpr int64_t block = 64;  // tokens: rounding errors grow with the length of a sum
  const int64_t channels = problem.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    T* const to = rows + sample * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = T(0);
    for (int64_t token = 0; token < problem.tokens; token += block) {
      const int64_t last = token + block < problem.tokens ? token + block : problem.tokens;
      int64_t c = 0;
      for (; c + 4 * kLanes<T> <= channels; c += 4 * kLanes<T>) add_norm_rows<4>(problem, sample, token, last, c, to);
      for (; c + kLanes<T> <= channels; c += kLanes<T>) add_norm_rows<1>(problem, sample, token, last, c, to);
      for (; c < channels; ++c) {
        T sum = 0;
        for (int64_t i = sample * problem.tokens + token; i < sample * problem.tokens + last; ++i)
          sum += problem.gradient[i * channels + c] *
                 ((problem.x[i * channels + c] - problem.mean[i]) * problem.inverse_std[i]);
        to[c] += sum;
      }
    }
  }
}

template void add_gram(const SampleRows<float>&, const GramMemory&, double*);
template void add_gram(const SampleRows<double>&, const GramMemory&, double*);
template void add_weight_gram(const WeightSamples<float>&, const WeightPart&, const WeightGramMemory<float>&, double*);
template void add_weight_gram(const WeightSamples<double>&, const WeightPart&, const WeightGramMemory<double>&,
                              double*);
template void sample_weight_row(const WeightSamples<float>&, int64_t, float*, float*);
template void sample_weight_row(const WeightSamples<double>&, int64_t, double*, double*);
template void norm_weight_rows(const NormSamples<float>&, int64_t, int64_t, float*);
template void norm_weight_rows(const NormSamples<double>&, int64_t, int64_t, double*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
