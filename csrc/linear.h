// Products of large matrices on the CPU: Linear layers, y = f(x W^T + b) + residual. No torch header.
//
// The right matrix of a product is packed: in blocks of its depth, and these in panels of a few vectors of columns, so
// that what the innermost loop reads lies in one piece that the first cache holds. The sum of an element is over one
// block after the other, whatever the tile: no result depends on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/for_each_isa.h"

namespace asvit_fast {

// Numbers of a packed matrix [depth, columns] for one instruction set.
struct Panels {
  int64_t lanes, width;  // columns of a vector, and of a panel; the last one may have fewer vectors
  int64_t scratch_rows;  // of a panel: as many panels take turns with each block of a tile's depth as their sums have
                         // room, so that the second cache holds what they all read

  static constexpr int64_t kDepth = 256;  // of a block at most

  int64_t count(int64_t columns) const { return (columns + width - 1) / width; }
  int64_t padded(int64_t columns) const { return (columns + lanes - 1) / lanes * lanes; }
  static int64_t blocks(int64_t depth) { return (depth + kDepth - 1) / kDepth; }
  static int64_t begin(int64_t depth, int64_t block) { return depth * block / blocks(depth); }
};

// LayerNorm of the rows of x: (x - mean) / sqrt(variance + eps) * weight + bias; none without a weight.
template <typename T>
struct RowNorm {
  const T *weight = nullptr, *bias = nullptr;  // [channels]
  T eps = T(0);
};

// What a layer does with its sums before the residual is added.
enum class Activation { none, gelu };

// A matrix that may lie in any order.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;  // distances of neighbours, in elements

  const T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// Operands of the product are numbers of type T, or pairs: two bfloat16 numbers that are neighbours along the depth, in
// the place of one of type T. Residual and y have numbers of type T, or bfloat16 then.
template <typename T>
struct Linear {
  Matrix<T> x;             // [rows, depth]
  int64_t depth, columns;  // depth: of operands
  const T* panels;         // of [depth, columns]
  const T* bias;           // [columns] or null, of type T
  const void* residual;    // [rows, columns], contiguous, or null
  Activation activation;
  void* y;  // [rows, columns], contiguous
  bool pairs;
  RowNorm<T> norm;    // of rows of x whose numbers are neighbours
  int64_t x_row = 0;  // of y, which x begins with
};

// Ranges of rows and of panels.
struct Tile {
  int64_t row, end_row, panel, end_panel;
};

// Numbers that a tile of so many rows, as deep as `depth` operands, needs to be normalised in: its rows, and one of
// single numbers, of which an operand has two at most.
inline int64_t normalised_size(int64_t rows, int64_t depth) { return (rows + 2) * depth; }

constexpr int64_t kTileRows = 384;  // of a Linear's tile, at most

// find_panels: how the instruction set packs.
//
// pack_panels: the columns of panels `first` <= i < `last` of a matrix [depth, columns].
//
// linear_tile: `scratch` has scratch_rows rows of a panel, and `normalised`, where there is a norm, normalised_size
// numbers.
ASVIT_FAST_FOR_EACH_ISA(find_panels, T, Panels* panels)
ASVIT_FAST_FOR_EACH_ISA(pack_panels, const Matrix<T>& matrix, int64_t depth, int64_t columns, int64_t first,
                        int64_t last, T* packed)
ASVIT_FAST_FOR_EACH_ISA(linear_tile, const Linear<T>& problem, const Tile& tile, T* scratch, T* normalised)

}  // namespace asvit_fast
