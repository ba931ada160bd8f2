// Products of large matrices for one instruction set.
#pragma once

#include "cpu/small_matmul.h"
#include "cpu/transpose.h"
#include "cpu/vector_math.h"
#include "cpu/weight_of.h"
#include "linear.h"

namespace asvit_fast {
namespace {

constexpr int kPanelVectors = 2;
template <typename T>
constexpr Panels kPanels = {kLanes<T>, kPanelVectors * kLanes<T>};

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
    for (int64_t lane = 0; lane < lanes; ++lane)
      to[(k - begin) * width + lane] = lane < count ? *matrix.at(k, j + lane) : T(0);
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

template <typename T>
inline void multiply_panel(const Product<T>& product, int64_t rows, int64_t vectors, int64_t depth) {
  if (vectors == 1) multiply_strip<T, 1>(product, rows, 0, depth);
  if (vectors == kPanelVectors) multiply_strip<T, kPanelVectors>(product, rows, 0, depth);
}

// x P(x), P the normal distribution function, as in unary_functions.h.
inline Vector<float> gelu_of(Vector<float> x) {
  const Vector<float> size = absolute<float>(x);
  const Vector<float> tail = VectorMath<float>::normal_tail(size, weight_of(-0.5f * x * x));  // P(-|x|)
  return x * (x < 0.f ? tail : 1.f - tail);
}

// Activation and residual of a strip that is in the cache; `columns` of them are written to y, which may be the strip.
template <typename T>
void finish_strip(const Linear<T>& problem, const Tile& tile, int64_t column, int64_t columns, T* strip, int64_t row) {
  for (int64_t i = tile.row; i < tile.end_row; ++i) {
    T* at = strip + (i - tile.row) * row;
    const int64_t place = i * problem.columns + column;
    int64_t j = 0;
    const auto finish = [&](Vector<T> x, Vector<T> residual) {
      if (problem.activation == Activation::gelu) x = gelu_of(x);
      return problem.residual ? x + residual : x;
    };
    for (; j + kLanes<T> <= columns; j += kLanes<T>)
      store<T>(problem.y + place + j,
               finish(load<T>(at + j), problem.residual ? load<T>(problem.residual + place + j) : Vector<T>{}));
    if (j < columns) {
      T residual[kLanes<T>] = {}, result[kLanes<T>];
      if (problem.residual)
        for (int64_t k = j; k < columns; ++k) residual[k - j] = problem.residual[place + k];
      store<T>(result, finish(load<T>(at + j), load<T>(residual)));
      for (int64_t k = j; k < columns; ++k) problem.y[place + k] = result[k - j];
    }
  }
}

// One panel's columns of a tile. Sums are kept in y between blocks of depth, or in `scratch` where a vector of columns
// is not whole.
template <typename T>
void multiply_block_of_depth(const Linear<T>& problem, const Tile& tile, int64_t block, int64_t panel, T* scratch) {
  const int64_t vectors = panel_vectors<T>(problem.columns, panel), width = vectors * kLanes<T>;
  const int64_t begin = Panels::begin(problem.depth, block), depth = Panels::begin(problem.depth, block + 1) - begin;
  const int64_t column = panel * kPanels<T>.width, left = problem.columns - column;
  const int64_t columns = left < width ? left : width;
  const bool whole = columns == width;
  T* const strip = whole ? problem.y + tile.row * problem.columns + column : scratch;
  const int64_t row = whole ? problem.columns : width;
  const T* base = problem.bias ? problem.bias + column : nullptr;
  if (base && !whole) {
    T* const padded = scratch + kTileRows * width;
    for (int64_t i = 0; i < width; ++i) padded[i] = i < columns ? base[i] : T(0);
    base = padded;
  }
  const Product<T> product = {problem.x.at(tile.row, begin),
                              problem.x.row,
                              problem.x.column,
                              problem.panels + panel_place<T>(problem.columns, begin, depth, panel),
                              width,
                              block == 0 ? base : strip,
                              block == 0 ? 0 : row,
                              strip,
                              row};
  multiply_panel(product, tile.end_row - tile.row, vectors, depth);
  const bool last = block + 1 == Panels::blocks(problem.depth);
  if (last && !(whole && problem.activation == Activation::none && !problem.residual))
    finish_strip(problem, tile, column, columns, strip, row);
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
void linear_tile(const Linear<T>& problem, const Tile& tile, T* scratch) {
  for (int64_t panel = tile.panel; panel < tile.end_panel; ++panel)
    for (int64_t block = 0; block < Panels::blocks(problem.depth); ++block)
      multiply_block_of_depth(problem, tile, block, panel, scratch);
}

template void find_panels(float, Panels*);
template void pack_panels(const Matrix<float>&, int64_t, int64_t, int64_t, int64_t, float*);
template void linear_tile(const Linear<float>&, const Tile&, float*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
