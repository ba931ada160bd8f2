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
  if (vectors == 1) multiply_strip<T, T, 1>(product, rows, 0, depth);
  if (vectors == kPanelVectors) multiply_strip<T, T, kPanelVectors>(product, rows, 0, depth);
}

// x P(x), P the normal distribution function, as in unary_functions.h.
inline Vector<float> gelu_of(Vector<float> x) {
  const Vector<float> size = absolute<float>(x);
  const Vector<float> tail = VectorMath<float>::normal_tail(size, weight_of(-0.5f * x * x));  // P(-|x|)
  return x * (x < 0.f ? tail : 1.f - tail);
}

// Activation and residual of a strip [rows][width] of sums, to `columns` of y.
template <typename T, typename Activate>
void finish_strip(const Linear<T>& problem, const Tile& tile, int64_t column, int64_t columns, const T* strip,
                  int64_t width, Activate activate) {
  const int64_t distance = problem.columns;
  const T* residual = problem.residual ? problem.residual + tile.row * distance + column : nullptr;
  T* y = problem.y + tile.row * distance + column;
  for (int64_t i = tile.row; i < tile.end_row; ++i, strip += width, y += distance) {
    int64_t j = 0;
    for (; j + kLanes<T> <= columns; j += kLanes<T>) {
      Vector<T> x = activate(load<T>(strip + j));
      if (residual) x += load<T>(residual + j);
      store<T>(y + j, x);
    }
    if (j < columns) {
      T last[kLanes<T>];
      store<T>(last, activate(load<T>(strip + j)));
      for (int64_t k = j; k < columns; ++k) y[k] = last[k - j] + (residual ? residual[k] : T(0));
    }
    if (residual) residual += distance;
  }
}

// One panel's columns of a tile. Sums that something is still to be added to are kept in `scratch`, [rows + 1][width],
// where they lie close together: rows of y may be so far apart that the first cache holds a few of them only.
template <typename T>
void multiply_block_of_depth(const Linear<T>& problem, const Tile& tile, int64_t block, int64_t panel, T* scratch) {
  const int64_t vectors = panel_vectors<T>(problem.columns, panel), width = vectors * kLanes<T>;
  const int64_t begin = Panels::begin(problem.depth, block), depth = Panels::begin(problem.depth, block + 1) - begin;
  const int64_t column = panel * kPanels<T>.width, left = problem.columns - column;
  const int64_t columns = left < width ? left : width;
  const int64_t rows = tile.end_row - tile.row;
  const bool last = block + 1 == Panels::blocks(problem.depth);
  const bool finished = columns == width && problem.activation == Activation::none && !problem.residual;
  const T* base = problem.bias ? problem.bias + column : nullptr;
  if (base && columns < width) {
    T* const padded = scratch + rows * width;
    for (int64_t i = 0; i < width; ++i) padded[i] = i < columns ? base[i] : T(0);
    base = padded;
  }
  const bool to_y = last && finished;
  const Product<T> product = {problem.x.at(tile.row, begin),
                              problem.x.row,
                              problem.x.column,
                              problem.panels + panel_place<T>(problem.columns, begin, depth, panel),
                              width,
                              block == 0 ? base : scratch,
                              block == 0 ? 0 : width,
                              to_y ? problem.y + tile.row * problem.columns + column : scratch,
                              to_y ? problem.columns : width};
  multiply_panel(product, rows, vectors, depth);
  if (!last || finished) return;
  if (problem.activation == Activation::gelu) {
    finish_strip(problem, tile, column, columns, scratch, width, gelu_of);
  } else {
    finish_strip(problem, tile, column, columns, scratch, width, [](Vector<T> x) { return x; });
  }
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
  const int64_t room = (tile.end_row - tile.row + 1) * kPanels<T>.width, group = kScratchRows * kPanels<T>.width / room;
  for (int64_t first = tile.panel; first < tile.end_panel; first += group) {
    const int64_t last = first + group < tile.end_panel ? first + group : tile.end_panel;
    for (int64_t block = 0; block < Panels::blocks(problem.depth); ++block)
      for (int64_t panel = first; panel < last; ++panel)
        multiply_block_of_depth(problem, tile, block, panel, scratch + (panel - first) * room);
  }
}

template void find_panels(float, Panels*);
template void pack_panels(const Matrix<float>&, int64_t, int64_t, int64_t, int64_t, float*);
template void linear_tile(const Linear<float>&, const Tile&, float*);

}  // namespace ASVIT_FAST_ISA
}  // namespace asvit_fast
