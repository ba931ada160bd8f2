// The backward pass of patch embedding for one instruction set. With normal values
// n, gradients g of the output and h = g * norm_weight, the gradient of the convolution's result is
//
//   (h - mean(h) - n mean(h n)) / deviation,
//
// whose products with the pixels, summed over tokens in registers, are the gradient of the weight.
#pragma once

#include "cpu/patch_embed_kernel.h"

namespace asvit_fast {
namespace {

// Sums of a piece: rows of [patch + 3, padded channels].
template <typename T>
struct PatchEmbedSums {
  T *weight, *bias, *norm_weight, *norm_bias;

  PatchEmbedSums(const PatchEmbedBackward<T>& problem, int64_t piece) {
    const int64_t padded = problem.forward.padded(), patch = problem.forward.patch();
    weight = problem.sums + piece * (patch + 3) * padded;
    bias = weight + patch * padded;
    norm_weight = bias + padded;
    norm_bias = norm_weight + padded;
  }
};

template <typename T>
inline void add_to(T* to, Vector<T> x) {
  store<T>(to, load<T>(to) + x);
}

// [tokens][channels] to [tokens][padded channels], zeros behind the channels.
template <typename T>
inline void pad_tokens(const PatchEmbed<T>& problem, const T* from, int64_t count, T* to) {
  const int64_t padded = problem.padded(), channels = problem.channels;
  for (int64_t token = 0; token < count; ++token, from += channels, to += padded) {
    int64_t i = 0;
    for (; i + kLanes<T> <= channels; i += kLanes<T>) store<T>(to + i, load<T>(from + i));
    for (; i < channels; ++i) to[i] = from[i];
    for (; i < padded; ++i) to[i] = T(0);
  }
}

// mean(h) and mean(h n) of a block's tokens, from values block and gradients [tokens][padded channels].
template <typename T, typename Vectors>
inline void find_means(const PatchEmbed<T>& problem, const T* block, const T* gradients, Vectors vectors,
                       const Moments<T>& moments, T* means, T* slopes) {
  const int64_t padded = problem.padded();
  const T share = T(1) / static_cast<T>(problem.channels);
#pragma GCC unroll 8
  for (int begin = 0; begin < kTokenBlock; begin += kLanes<T>) {
    Vector<T> sums[kLanes<T>] = {}, products[kLanes<T>] = {};
    for (int64_t i = 0; i < vectors(); ++i) {
      const int64_t at = i * kLanes<T>;
      const Vector<T> weight = load<T>(problem.norm_weight + at);
#pragma GCC unroll 16
      for (int token = 0; token < kLanes<T> && begin + token < kTokenBlock; ++token) {
        const int64_t row = (begin + token) * padded + at;
        const Vector<T> h = load<T>(gradients + row) * weight;
        sums[token] += h;
        products[token] += h * (load<T>(block + row) - moments.mean[begin + token]);
      }
    }
    store<T>(means + begin, totals<T>(sums) * share);
    store<T>(slopes + begin, totals<T>(products) * load<T>(moments.scale + begin) * share);
  }
}

// Turns gradients of the output [tokens][padded channels] into those of the convolution's output, in place, and adds
// the block's share of the parameters'. Behind the `count` tokens that there are gradients are zero and stay so.
template <typename T, typename Vectors>
void differentiate_norm(const PatchEmbed<T>& problem, const T* block, int64_t count, Vector<T> last, Vectors vectors,
                        const PatchEmbedSums<T>* sums, T* gradients) {
  const int64_t padded = problem.padded();
  Moments<T> moments;
  T means[kMaximumTokenBlock + kLanes<T>], slopes[kMaximumTokenBlock + kLanes<T>];
  find_moments(problem, block, last, vectors, moments);
  for (int64_t token = count; token < kTokenBlock; ++token) moments.scale[token] = T(0);  // not infinite where eps is 0
  find_means(problem, block, gradients, vectors, moments, means, slopes);
  for (int64_t i = 0; i < vectors(); ++i) {
    const int64_t at = i * kLanes<T>;
    const Vector<T> weight = load<T>(problem.norm_weight + at);
    Vector<T> grad_weight = {}, grad_bias = {}, grad_conv_output = {};
#pragma GCC unroll 16
    for (int token = 0; token < kTokenBlock; ++token) {
      T* place = gradients + token * padded + at;
      const Vector<T> gradient = load<T>(place), x = load<T>(block + token * padded + at);
      const Vector<T> normal = (x - moments.mean[token]) * moments.scale[token];
      const Vector<T> grad_value = (gradient * weight - means[token] - normal * slopes[token]) * moments.scale[token];
      grad_weight += gradient * normal;
      grad_bias += gradient;
      grad_conv_output += grad_value;
      store<T>(place, grad_value);
    }
    if (!sums) continue;
    add_to<T>(sums->norm_weight + at, grad_weight);
    add_to<T>(sums->norm_bias + at, grad_bias);
    add_to<T>(sums->bias + at, grad_conv_output);
  }
}

// Adds the products of all tokens of a row with `count` neighbouring pixels in each of `lines` rows of pixels of their
// patches to `to` [count][padded] of each line. An addition has to wait for the one before: few products are summed in
// two or four independent rows of sums.
template <int lines, int count, int vectors, typename T>
inline void add_products(const PatchEmbed<T>& problem, const T* pixels, int64_t line, const T* tokens, T* to) {
  constexpr int products = lines * count * vectors, copies = products > 8 || !kWide ? 1 : products > 4 ? 2 : 4;
  const int64_t padded = problem.padded(), dilation = problem.dilation, stride = problem.stride;
  Vector<T> sums[copies][lines][count][vectors] = {};
  const auto add_token = [&](Vector<T>(&sum)[lines][count][vectors]) {
    Vector<T> values[vectors];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) values[i] = load<T>(tokens + i * kLanes<T>);
#pragma GCC unroll 2
    for (int y = 0; y < lines; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < count; ++x) {
        const Vector<T> pixel = broadcast<T>(pixels[y * line + x * dilation]);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sum[y][x][i] += pixel * values[i];
      }
    pixels += stride;
    tokens += padded;
  };
  int64_t token = 0;
  for (; token + copies <= problem.columns; token += copies)
#pragma GCC unroll 4
    for (int copy = 0; copy < copies; ++copy) add_token(sums[copy]);
  for (; token < problem.columns; ++token) add_token(sums[0]);
#pragma GCC unroll 2
  for (int y = 0; y < lines; ++y)
#pragma GCC unroll 8
    for (int x = 0; x < count; ++x)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) {
#pragma GCC unroll 4
        for (int copy = 1; copy < copies; ++copy) sums[0][y][x][i] += sums[copy][y][x][i];
        add_to<T>(to + (y * problem.kernel + x) * padded + i * kLanes<T>, sums[0][y][x][i]);
      }
}

// Of `lines` rows of pixels, all channels.
template <int lines, int count, typename T>
void add_lines(const PatchEmbed<T>& problem, const T* pixels, int64_t line, const T* tokens, T* to) {
  constexpr int vectors = kWide ? kChannelVectors : 1;
  const int64_t end = vector_count(problem) * kLanes<T>;
  int64_t i = 0;
  for (; i + vectors * kLanes<T> <= end; i += vectors * kLanes<T>)
    add_products<lines, count, vectors>(problem, pixels, line, tokens + i, to + i);
  if (i < end) add_products<lines, count, 1>(problem, pixels, line, tokens + i, to + i);
}

// tokens: [columns][padded channels], gradients of the convolution's output. `count` neighbouring pixels of each row,
// from the pixel x on; of few pixels two rows of a patch together, so that enough sums do not wait for each other.
template <int count, typename T>
void add_columns(const PatchEmbed<T>& problem, const TokenRow<T>& row, int64_t x, const T* tokens, T* grad_weight) {
  constexpr int lines = count <= 4 ? 2 : 1;
  const int64_t padded = problem.padded(), kernel = problem.kernel;
  for (int64_t image = 0; image < problem.in_channels; ++image) {
    const int64_t end = image * kernel + row.end;
    int64_t y = image * kernel + row.begin;
    const auto add = [&](auto together) {
      const T* pixels = row.pixels + y * row.row + x * problem.dilation;
      add_lines<together(), count>(problem, pixels, row.row, tokens, grad_weight + (y * kernel + x) * padded);
      y += together();
    };
    while (y + lines <= end) add(Constant<lines>());
    while (y < end) add(Constant<1>());
  }
}

template <typename T>
void add_weight_gradient(const PatchEmbed<T>& problem, const TokenRow<T>& row, const T* tokens, T* grad_weight) {
  for (int64_t x = 0; x < problem.kernel; x += 8) {
    const auto add = [&](auto count) { add_columns<count()>(problem, row, x, tokens, grad_weight); };
    switch (problem.kernel - x) {
      case 1:
        add(Constant<1>());
        break;
      case 2:
        add(Constant<2>());
        break;
      case 3:
        add(Constant<3>());
        break;
      case 4:
        add(Constant<4>());
        break;
      case 5:
        add(Constant<5>());
        break;
      case 6:
        add(Constant<6>());
        break;
      case 7:
        add(Constant<7>());
        break;
      default:
        add(Constant<8>());
    }
  }
}

// A row of tokens: gradients of the convolution's output [columns][padded channels] to `tokens`, which has room for
// whole blocks.
template <typename T>
void differentiate_row(const PatchEmbedBackward<T>& problem, const TokenRow<T>& row, int64_t index, Vector<T> last,
                       const PatchEmbedSums<T>* sums, T* block, T* tokens) {
  const PatchEmbed<T>& forward = problem.forward;
  const int64_t padded = forward.padded(), channels = forward.channels, columns = forward.columns;
  pad_tokens(forward, problem.gradient + index * columns * channels, columns, tokens);
  for (int64_t first = 0; forward.norm_weight && first < columns; first += kTokenBlock) {
    const int64_t count = columns - first < kTokenBlock ? columns - first : kTokenBlock;
    if (problem.conv_output) {
      pad_tokens(forward, problem.conv_output + (index * columns + first) * channels, count, block);
    } else {
      convolve(forward, row, first, block);
    }
    with_vectors(forward, [&](auto vectors) {
      differentiate_norm(forward, block, count, last, vectors, sums, tokens + first * padded);
    });
  }
  for (int64_t i = 0; sums && !forward.norm_weight && i < vector_count(forward) * kLanes<T>; i += kLanes<T>) {
    Vector<T> sum = {};
    for (int64_t token = 0; token < columns; ++token) sum += load<T>(tokens + token * padded + i);
    add_to<T>(sums->bias + i, sum);
  }
  if (problem.grad_conv_output)
    copy_tokens(forward, tokens, columns, problem.grad_conv_output + index * columns * channels);
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void patch_embed_backward(const PatchEmbedBackward<T>& problem, int64_t begin, int64_t end, char* bytes) {
  const PatchEmbed<T>& forward = problem.forward;
  Arena arena(bytes);
  const PatchEmbedMemory<T> memory(problem, arena);
  const Vector<T> last = last_lanes(forward);
  const int64_t rows = forward.batch * forward.rows;
  clear(bytes, arena.used());
  for (int64_t piece = begin; piece < end; ++piece) {
    const PatchEmbedSums<T> sums(problem, piece);
    for (int64_t index = rows * piece / problem.pieces; index < rows * (piece + 1) / problem.pieces; ++index) {
      const TokenRow<T> row = copy_pixels(forward, index, memory.row, memory.pixels);
      differentiate_row(problem, row, index, last, problem.sums ? &sums : nullptr, memory.block, memory.tokens);
      if (problem.sums) add_weight_gradient(forward, row, memory.tokens, sums.weight);
    }
  }
}

template void patch_embed_backward(const PatchEmbedBackward<float>&, int64_t, int64_t, char*);
template void patch_embed_backward(const PatchEmbedBackward<double>&, int64_t, int64_t, char*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
