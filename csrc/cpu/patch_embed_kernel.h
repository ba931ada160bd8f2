// Patch embedding for one instruction set. Lanes are channels: each pixel of a patch is broadcast from a row of the
// padded image and multiplied with vectors of the weight, for a block of tokens whose sums stay in registers. The block
// is normalised while the nearest cache has it, and written channels last.
#pragma once

#include "cpu/transpose.h"
#include "patch_embed.h"

namespace asvit_fast {
namespace {

constexpr bool kWide = ASVIT_FAST_VECTOR_BYTES == 64;  // 32 registers
constexpr int kTokenBlock = kWide ? 14 : 6;            // with two vectors of channels: 28 or 12 sums
constexpr int kChannelVectors = 2;
static_assert(kTokenBlock <= kMaximumTokenBlock, "the memory holds one block");

template <typename T>
inline int64_t vector_count(const PatchEmbed<T>& problem) {
  return (problem.channels + kLanes<T> - 1) / kLanes<T>;
}

// --------------------------------------------------------------------------- rows of pixels

// One row of tokens: its image, and what its patches see of the padded image's rows.
template <typename T>
struct TokenRow {
  int64_t begin, end;  // of the patches' rows of pixels, those inside the image
  int64_t row;         // length of a row of pixels
  const T* pixels;     // [in_channels, kernel, row]
};

// The part beyond the image is written once and stays zero.
template <typename T>
void clear(T* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = T(0);
}

// Prefetches what the next row of tokens will read, which hardware does not foresee: short pieces of many rows.
template <typename T>
inline void prefetch(const T* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// The rows of pixels of the row of tokens `index` of batch * rows, copied behind their zeros on the left.
template <typename T>
TokenRow<T> copy_pixels(const PatchEmbed<T>& problem, int64_t index, int64_t row, T* pixels) {
  const int64_t image = index / problem.rows, top = index % problem.rows * problem.stride - problem.top;
  const int64_t above = top < 0 ? -top : 0, inside = problem.height - top;  // rows of pixels from the first
  const auto rows_before = [&](int64_t limit) {  // how many of the patches' rows lie before pixel row `limit`
    const int64_t count = limit <= 0 ? 0 : (limit + problem.dilation - 1) / problem.dilation;
    return count < problem.kernel ? count : problem.kernel;
  };
  const TokenRow<T> result = {rows_before(above), rows_before(inside), row, pixels};
  const int64_t room = row - problem.left, count = problem.width < room ? problem.width : room;
  const ImageStrides strides = problem.strides;
  for (int64_t channel = 0; channel < problem.in_channels; ++channel) {
    for (int64_t i = result.begin; i < result.end; ++i) {
      const T* from = problem.image + image * strides.batch + channel * strides.channel +
                      (top + i * problem.dilation) * strides.row;
      T* to = pixels + (channel * problem.kernel + i) * row + problem.left;
      if (strides.column == 1) {
        if (count > 0) std::memcpy(to, from, count * sizeof(T));
        prefetch(from + problem.stride * strides.row, count);
        continue;
      }
      for (int64_t x = 0; x < count; ++x) to[x] = from[x * strides.column];
    }
  }
  return result;
}

// --------------------------------------------------------------------------- convolution

// A compile-time number, or (0) one that is known when it runs.
template <int constant>
struct Number {
  int64_t value;
  inline int64_t operator()() const { return constant ? constant : value; }
};

// Sums [tokens][vectors] of the tokens from `first` on and the channels from `channel` on, with the bias.
template <int vectors, typename T, typename Step>
inline void convolve_block(const PatchEmbed<T>& problem, const TokenRow<T>& row, int64_t first, int64_t channel,
                           Step stride, T* block) {
  const int64_t padded = problem.padded(), kernel = problem.kernel, dilation = problem.dilation;
  Vector<T> sums[kTokenBlock][vectors] = {};
  for (int64_t image = 0; image < problem.in_channels; ++image) {
    for (int64_t y = image * kernel + row.begin; y < image * kernel + row.end; ++y) {
      const T* pixel = row.pixels + y * row.row + first * stride();
      const T* weight = problem.weight + y * kernel * padded + channel;
      for (int64_t x = 0; x < kernel; ++x, pixel += dilation, weight += padded) {
        Vector<T> weights[vectors];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) weights[i] = load<T>(weight + i * kLanes<T>);
#pragma GCC unroll 16
        for (int token = 0; token < kTokenBlock; ++token) {
          const Vector<T> value = broadcast<T>(pixel[token * stride()]);
#pragma GCC unroll 4
          for (int i = 0; i < vectors; ++i) sums[token][i] += value * weights[i];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int token = 0; token < kTokenBlock; ++token)
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) {
      const int64_t at = channel + i * kLanes<T>;
      store<T>(block + token * padded + at, sums[token][i] + load<T>(problem.bias + at));  // last: it may be large
    }
}

// All channels of a block of tokens: block [tokens][padded channels].
template <typename T, typename Step>
void convolve(const PatchEmbed<T>& problem, const TokenRow<T>& row, int64_t first, Step stride, T* block) {
  const int64_t end = vector_count(problem) * kLanes<T>;
  int64_t channel = 0;
  for (; channel + kChannelVectors * kLanes<T> <= end; channel += kChannelVectors * kLanes<T>)
    convolve_block<kChannelVectors>(problem, row, first, channel, stride, block);
  if (channel < end) convolve_block<1>(problem, row, first, channel, stride, block);
}

// With the usual strides as constants, so that the tokens' pixels are at constant distances.
template <typename T>
void convolve(const PatchEmbed<T>& problem, const TokenRow<T>& row, int64_t first, T* block) {
  switch (problem.stride) {
    case 2:
      return convolve(problem, row, first, Number<2>{2}, block);
    case 4:
      return convolve(problem, row, first, Number<4>{4}, block);
    case 8:
      return convolve(problem, row, first, Number<8>{8}, block);
    case 16:
      return convolve(problem, row, first, Number<16>{16}, block);
    default:
      return convolve(problem, row, first, Number<0>{problem.stride}, block);
  }
}

// --------------------------------------------------------------------------- normalisation

// Lane i of the result: the sum of the lanes of rows[i].
template <typename T, int stride = 1>
inline Vector<T> totals(Vector<T> (&rows)[kLanes<T>]) {
  if constexpr (stride < kLanes<T>) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes<T>; row += 2 * stride) {
      exchange<T, stride>(rows[row], rows[row + stride], typename FirstIntegers<kLanes<T>>::Type());
      rows[row] += rows[row + stride];
    }
    return totals<T, stride * 2>(rows);
  } else {
    return rows[0];
  }
}

// Per token of a block.
template <typename T>
struct Moments {
  T mean[kMaximumTokenBlock + kLanes<T>], scale[kMaximumTokenBlock + kLanes<T>];  // scale = 1 / sqrt(variance + eps)
};

// 1 for the lanes of the last vector of channels that are channels, 0 behind them.
template <typename T>
inline Vector<T> last_lanes(const PatchEmbed<T>& problem) {
  const int64_t count = problem.channels - (vector_count(problem) - 1) * kLanes<T>;
  Vector<T> lanes = {};
  for (int i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? T(1) : T(0);
  return lanes;
}

// Mean and variance in two passes over block [tokens][padded channels]: one pass would cancel where |mean| >>
// deviation.
template <typename T, typename Vectors>
inline void find_moments(const PatchEmbed<T>& problem, const T* block, Vector<T> last, Vectors vectors,
                         Moments<T>& moments) {
  const int64_t padded = problem.padded();
  const T share = T(1) / static_cast<T>(problem.channels);
#pragma GCC unroll 8
  for (int begin = 0; begin < kTokenBlock; begin += kLanes<T>) {
    Vector<T> rows[kLanes<T>] = {};
    for (int64_t i = 0; i < vectors(); ++i)  // tokens innermost: their sums do not wait for each other
#pragma GCC unroll 16
      for (int token = 0; token < kLanes<T> && begin + token < kTokenBlock; ++token)
        rows[token] += load<T>(block + (begin + token) * padded + i * kLanes<T>);
    store<T>(moments.mean + begin, totals<T>(rows) * share);
#pragma GCC unroll 16
    for (Vector<T>& row : rows) row = Vector<T>{};
    for (int64_t i = 0; i < vectors(); ++i) {
      const Vector<T> lanes = i + 1 < vectors() ? broadcast<T>(1) : last;
#pragma GCC unroll 16
      for (int token = 0; token < kLanes<T> && begin + token < kTokenBlock; ++token) {
        const Vector<T> value = load<T>(block + (begin + token) * padded + i * kLanes<T>);
        const Vector<T> deviation = (value - moments.mean[begin + token]) * lanes;
        rows[token] += deviation * deviation;
      }
    }
    T roots[kLanes<T>];
    store<T>(roots, totals<T>(rows) * share + problem.eps);
    for (T& root : roots) root = square_root(root);
    store<T>(moments.scale + begin, T(1) / load<T>(roots));
  }
}

// Tokens [count][channels] from value(token, channel), a vector. A token's last vector overlaps the one before where
// lanes do not divide the channels.
template <typename T, typename Vectors, typename Value>
inline void write_tokens(int64_t channels, int64_t count, Vectors vectors, T* output, Value value) {
  for (int64_t token = 0; token < count; ++token, output += channels) {
    for (int64_t i = 0; i < vectors() - 1; ++i) store<T>(output + i * kLanes<T>, value(token, i * kLanes<T>));
    if (channels >= kLanes<T>) {
      store<T>(output + channels - kLanes<T>, value(token, channels - kLanes<T>));
    } else {
      const Vector<T> x = value(token, 0);
      std::memcpy(output, &x, channels * sizeof(T));
    }
  }
}

// block [tokens][padded channels] to [tokens][channels], as it is.
template <typename T>
inline void copy_tokens(const PatchEmbed<T>& problem, const T* block, int64_t count, T* output) {
  const int64_t padded = problem.padded();
  write_tokens(problem.channels, count, Number<0>{vector_count(problem)}, output,
               [&](int64_t token, int64_t i) { return load<T>(block + token * padded + i); });
}

// Calls run(number of vectors), the usual ones as constants.
template <typename T, typename Run>
inline void with_vectors(const PatchEmbed<T>& problem, Run run) {
  switch (vector_count(problem)) {
    case 1:
      return run(Number<1>{1});
    case 2:
      return run(Number<2>{2});
    case 3:
      return run(Number<3>{3});
    case 4:
      return run(Number<4>{4});
    default:
      return run(Number<0>{vector_count(problem)});
  }
}

template <typename T, typename Vectors>
void normalise_tokens(const PatchEmbed<T>& problem, const T* block, int count, Vector<T> last, Vectors vectors,
                      T* output) {
  const int64_t padded = problem.padded();
  Moments<T> moments;
  find_moments(problem, block, last, vectors, moments);
  write_tokens(problem.channels, count, vectors, output, [&](int64_t token, int64_t i) {
    const Vector<T> normal = (load<T>(block + token * padded + i) - moments.mean[token]) * moments.scale[token];
    return normal * load<T>(problem.norm_weight + i) + load<T>(problem.norm_bias + i);
  });
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void patch_embed(const PatchEmbed<T>& problem, T* output, T* conv_output, int64_t begin, int64_t end, char* bytes) {
  Arena arena(bytes);
  const PatchEmbedMemory<T> memory(problem, arena);
  T* block = memory.block;
  const Vector<T> last = last_lanes(problem);
  clear(memory.pixels, problem.image_rows() * memory.row);
  for (int64_t index = begin; index < end; ++index) {
    const TokenRow<T> row = copy_pixels(problem, index, memory.row, memory.pixels);
    for (int64_t first = 0; first < problem.columns; first += kTokenBlock) {
      const int64_t left = problem.columns - first, place = (index * problem.columns + first) * problem.channels;
      const int count = static_cast<int>(left < kTokenBlock ? left : kTokenBlock);
      convolve(problem, row, first, block);
      if (conv_output) copy_tokens(problem, block, count, conv_output + place);
      if (problem.norm_weight) {
        with_vectors(problem,
                     [&](auto vectors) { normalise_tokens(problem, block, count, last, vectors, output + place); });
      } else {
        copy_tokens(problem, block, count, output + place);
      }
    }
  }
}

template void patch_embed(const PatchEmbed<float>&, float*, float*, int64_t, int64_t, char*);
template void patch_embed(const PatchEmbed<double>&, double*, double*, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
