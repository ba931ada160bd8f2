// Products of large matrices for one instruction set.
#pragma once

#include "cpu/small_matmul.h"
#include "cpu/transpose.h"
#include "cpu/vector_math.h"
#include "cpu/weight_of.h"
#include "linear.h"

namespace asvit_fast {
namespace {

template <typename T>
constexpr Panels kPanels = {kLanes<T>, kMostVectors * kLanes<T>, kWideRegisters ? 768 : 1536};

// Vectors of a panel.
template <typename T>
inline int64_t panel_vectors(int64_t columns, int64_t panel) {
  const int64_t left = kPanels<T>.padded(columns) - panel * kPanels<T>.width;
  return (left < kPanels<T>.width ? left : kPanels<T>.width) / kLanes<T>;
}

// Where a panel of a block that begins at `begin` and is `depth` deep lies in a packed matrix.
template <typename T>
inline int64_t panel_place(int64_t columns, int64_t begin, int64_t depth, int64_t panel) {
  return begin * kPanels<T>.padded(columns) + panel * kPanels<T>.width * depth;
}

// --------------------------------------------------------------------------- packing

// `count` <= lanes neighbouring columns from column j on, of rows begin <= k < end: to [row][width].
template <typename T>
void pack_columns(const Matrix<T>& matrix, int64_t begin, int64_t end, int64_t j, int64_t count, int64_t width, T* to) {
  constexpr int lanes = kLanes<T>;
  int64_t k = begin;
  if (matrix.column == 1 && count == lanes) {
    for (; k < end; ++k) store<T>(to + (k - begin) * width, load<T>(matrix.at(k, j)));
  } else if (matrix.row == 1 && count == lanes) {
    for (; k + lanes <= end; k += lanes) {
      Vector<T> block[lanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) block[lane] = load<T>(matrix.at(k, j + lane));
      transpose<T>(block);
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane) store<T>(to + (k - begin + lane) * width, block[lane]);
    }
  }
  for (; k < end; ++k)
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T number = T(0);
      if (lane < count) std::memcpy(&number, matrix.at(k, j + lane), sizeof number);
      std::memcpy(to + (k - begin) * width + lane, &number, sizeof number);
    }
}

// One panel of rows begin <= k < end, [row][width].
template <typename T>
void pack_panel(const Matrix<T>& matrix, int64_t begin, int64_t end, int64_t columns, int64_t panel, T* to) {
  const int64_t vectors = panel_vectors<T>(columns, panel), width = vectors * kLanes<T>;
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const int64_t j = panel * kPanels<T>.width + vector * kLanes<T>, left = columns - j;
    pack_columns(matrix, begin, end, j, left < kLanes<T> ? left : kLanes<T>, width, to + vector * kLanes<T>);
  }
}

// --------------------------------------------------------------------------- products

// The sum of value(x) of `count` numbers; value takes vectors and single numbers.
template <typename T, typename Value>
inline T sum_of(const T* x, int64_t count, Value value) {
  constexpr int lanes = kLanes<T>;
  Vector<T> first = {}, second = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    first += value(load<T>(x + i));
    second += value(load<T>(x + i + lanes));
  }
  for (; i + lanes <= count; i += lanes) first += value(load<T>(x + i));
  T sum = total<T>(first + second);
  for (; i < count; ++i) sum += value(x[i]);
  return sum;
}

// LayerNorm of `channels` numbers. Their mean is rounded, which matters where they differ little: what it lacks is the
// mean of what is left without it.
template <typename T, typename Number>
inline void normalise_row(const RowNorm<T>& norm, const T* x, int64_t channels, Number* to) {
  constexpr int lanes = kLanes<T>;
  const T count = static_cast<T>(channels);
  const T mean = sum_of(x, channels, [](auto number) { return number; }) / count;
  const T rest = sum_of(x, channels, [mean](auto number) { return number - mean; }) / count;
  const auto centred = [mean, rest](auto number) { return (number - mean) - rest; };
  const T squares = sum_of(x, channels, [&](auto number) { return centred(number) * centred(number); });
  // NaN where the squares are infinite, or a network that overflows would look as if all were well
  const T scale = T(1) / square_root(squares / count + norm.eps) + (squares - squares);
  int64_t i = 0;
  for (; i + lanes <= channels; i += lanes)
    store_rounded(to + i, centred(load<T>(x + i)) * scale * load<T>(norm.weight + i) + load<T>(norm.bias + i));
  for (; i < channels; ++i) to[i] = convert(centred(x[i]) * scale * norm.weight[i] + norm.bias[i], Number());
}

// The rows of a tile, one after the other.
template <typename Operand, typename Number, typename T>
void normalise_rows(const Linear<T>& problem, const Tile& tile, T* to) {
  const int64_t channels = problem.depth * static_cast<int64_t>(sizeof(Operand) / sizeof(Number));
  T* const wide = to + (tile.end_row - tile.row) * problem.depth;
  for (int64_t row = tile.row; row < tile.end_row; ++row, to += problem.depth) {
    const auto* const x = reinterpret_cast<const Number*>(problem.x.at(row, 0));
    convert_row(x, channels, wide);
    normalise_row(problem.norm, wide, channels, reinterpret_cast<Number*>(to));
  }
}

// x P(x), P the normal distribution function, as in unary_functions.h, given P(-|x|).
inline Vector<float> gelu_by(Vector<float> x, Vector<float> tail) { return x * (x < 0.f ? tail : 1.f - tail); }

inline Vector<float> gelu_of(Vector<float> x) {
  return gelu_by(x, VectorMath<float>::normal_tail(absolute<float>(x), weight_of(-0.5f * x * x)));
}

// The same for results of 8 bits, to a relative error of 2e-4: as t q(t) exp(-x^2 / 2) there, with fewer terms.
#if ASVIT_FAST_BF16_DOT
inline Vector<float> coarse_gelu_of(Vector<float> x) {
  constexpr float tail[] = {0.101324237f, 0.0807143628f, 0.179843646f, -0.10323442f, 0.241330597f};
  constexpr float power[] = {0.999928073f, 0.693260995f, 0.242611143f, 0.0551716271f};  // 2^r, -1/2 <= r <= 1/2
  constexpr float lowest = -200.f;
  const Vector<float> t = _mm512_rcp14_ps(absolute<float>(x) * 0.25f + 1.f), y = x * x * -0.72134752f;  // log2(e) / 2
  const Vector<float> exponent = lowest > y ? broadcast<float>(lowest) : y, n = _mm512_roundscale_ps(exponent, 0);
  const Vector<float> bell = _mm512_scalef_ps(polynomial<float>(power, exponent - n), n);
  return gelu_by(x, t * polynomial<float>(tail, t) * bell);
}
#else
inline Vector<float> coarse_gelu_of(Vector<float> x) { return gelu_of(x); }
#endif

// Activation and residual of a strip [rows][width] of sums, to `columns` of y, which has numbers of type Number.
template <typename Number, typename T, typename Activate>
void finish_strip(const Linear<T>& problem, int64_t row, int64_t end_row, int64_t column, int64_t columns,
                  const T* strip, int64_t width, Activate activate) {
  const int64_t distance = problem.columns;
  const auto* residual = static_cast<const Number*>(problem.residual);
  if (residual) residual += row * distance + column;
  Number* y = static_cast<Number*>(problem.y) + row * distance + column;
  for (int64_t i = row; i < end_row; ++i, strip += width, y += distance) {
    int64_t j = 0;
    for (; j + kLanes<T> <= columns; j += kLanes<T>) {
      Vector<T> x = activate(load<T>(strip + j));
      if (residual) x += load_wide(residual + j);
      store_rounded(y + j, x);
    }
    if (j < columns) {
      const int64_t rest = (columns - j) * static_cast<int64_t>(sizeof(Number));
      Number last[kLanes<T>] = {};
      if (residual) std::memcpy(last, residual + j, rest);
      Vector<T> x = activate(load<T>(strip + j));
      if (residual) x += load_wide(last);
      store_rounded(last, x);
      std::memcpy(y + j, last, rest);
    }
    if (residual) residual += distance;
  }
}

// Rows of a strip that are finished while the first cache holds their sums.
constexpr int64_t kFinishedRows = 64;

// One panel's columns of a tile. Sums that something is still to be added to are kept in `scratch`, [rows + 1][width],
// where they lie close together: rows of y may be so far apart that the first cache holds a few of them only.
template <typename Operand, typename Number, typename T>
void multiply_block_of_depth(const Linear<T>& problem, const Tile& tile, int64_t block, int64_t panel, T* scratch) {
  const int64_t vectors = panel_vectors<T>(problem.columns, panel), width = vectors * kLanes<T>;
  const int64_t begin = Panels::begin(problem.depth, block), depth = Panels::begin(problem.depth, block + 1) - begin;
  const int64_t column = panel * kPanels<T>.width, left = problem.columns - column;
  const int64_t columns = left < width ? left : width;
  const bool last = block + 1 == Panels::blocks(problem.depth);
  const bool to_y = last && columns == width && problem.activation == Activation::none && !problem.residual;
  const T* base = problem.bias ? problem.bias + column : nullptr;
  if (base && columns < width) {
    T* const padded = scratch + (tile.end_row - tile.row) * width;
    for (int64_t i = 0; i < width; ++i) padded[i] = i < columns ? base[i] : T(0);
    base = padded;
  }
  const T* panels = problem.panels + panel_place<T>(problem.columns, begin, depth, panel);
  const auto multiply_to = [&](auto* to, int64_t to_row, int64_t row, int64_t end_row) {
    const T* sums = scratch + (row - tile.row) * width;
    using To = std::remove_pointer_t<decltype(to)>;
    multiply_vectors(Product<T, Operand, To>{reinterpret_cast<const Operand*>(problem.x.at(row - problem.x_row, begin)),
                                             problem.x.row, problem.x.column, reinterpret_cast<const Operand*>(panels),
                                             width, block == 0 ? base : sums, block == 0 ? 0 : width, to, to_row},
                     end_row - row, vectors, depth);
  };
  if (to_y) {
    multiply_to(static_cast<Number*>(problem.y) + tile.row * problem.columns + column, problem.columns, tile.row,
                tile.end_row);
    return;
  }
  const int64_t step = last ? kFinishedRows : tile.end_row - tile.row;
  for (int64_t row = tile.row; row < tile.end_row; row += step) {
    const int64_t end_row = row + step < tile.end_row ? row + step : tile.end_row;
    T* const sums = scratch + (row - tile.row) * width;
    multiply_to(sums, width, row, end_row);
    if (!last) continue;
    if (problem.activation == Activation::none) {
      finish_strip<Number>(problem, row, end_row, column, columns, sums, width, [](Vector<T> x) { return x; });
    } else if constexpr (is_pair<Operand>) {
      finish_strip<Number>(problem, row, end_row, column, columns, sums, width, coarse_gelu_of);
    } else {
      finish_strip<Number>(problem, row, end_row, column, columns, sums, width, gelu_of);
    }
  }
}

template <typename Operand, typename Number, typename T>
void multiply_tile(const Linear<T>& problem, const Tile& tile, T* scratch) {
  const int64_t room = (tile.end_row - tile.row + 1) * kPanels<T>.width,
                group = kPanels<T>.scratch_rows * kPanels<T>.width / room;
  for (int64_t first = tile.panel; first < tile.end_panel; first += group) {
    const int64_t last = first + group < tile.end_panel ? first + group : tile.end_panel;
    for (int64_t block = 0; block < Panels::blocks(problem.depth); ++block)
      for (int64_t panel = first; panel < last; ++panel)
        multiply_block_of_depth<Operand, Number>(problem, tile, block, panel, scratch + (panel - first) * room);
  }
}

template <typename Operand, typename Number, typename T>
void normalise_and_multiply(Linear<T> problem, const Tile& tile, T* scratch, T* normalised) {
  if (problem.norm.weight) {
    normalise_rows<Operand, Number>(problem, tile, normalised);
    problem.x = {normalised, problem.depth, 1};
    problem.x_row = tile.row;
  }
  multiply_tile<Operand, Number>(problem, tile, scratch);
}

}  // namespace

namespace ASVIT_FAST_ISA {

template <typename T>
void find_panels(T, Panels* panels) {
  *panels = kPanels<T>;
}

template <typename T>
void pack_panels(const Matrix<T>& matrix, int64_t depth, int64_t columns, int64_t first, int64_t last, T* packed) {
  for (int64_t block = 0; block < Panels::blocks(depth); ++block) {
    const int64_t begin = Panels::begin(depth, block), end = Panels::begin(depth, block + 1);
    for (int64_t panel = first; panel < last; ++panel)
      pack_panel(matrix, begin, end, columns, panel, packed + panel_place<T>(columns, begin, end - begin, panel));
  }
}

template <typename T>
void linear_tile(const Linear<T>& problem, const Tile& tile, T* scratch, T* normalised) {
  if constexpr (kHasPairs)
    if (problem.pairs) return normalise_and_multiply<Pair, BFloat16>(problem, tile, scratch, normalised);
  normalise_and_multiply<T, T>(problem, tile, scratch, normalised);
}

template void find_panels(float, Panels*);
template void pack_panels(const Matrix<float>&, int64_t, int64_t, int64_t, int64_t, float*);
template void linear_tile(const Linear<float>&, const Tile&, float*, float*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
