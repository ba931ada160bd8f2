"""What the Triton kernels of windowed attention share: where a window's tokens are, tiles in and out, scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# integers whose value or divisibility must not compile another kernel: maps and batches change during training
SIZES = ("windows", "per_program", "height", "width", "shift_rows", "shift_columns")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a [M, K] @ b [K, N] -> float32. The interpreter's product does not know bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def place(
    window, token, height, width, shift_rows, shift_columns, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr
):
    """Of tokens [T] of a window: index in [B * H * W], whether there is such a token, and its region of the shifted map
    (0 to 3): only tokens of one region attend each other."""
    down = tl.cdiv(height, WINDOW_ROWS)  # windows along each axis
    across = tl.cdiv(width, WINDOW_COLUMNS)
    image = window // (down * across)
    row = (window // across % down) * WINDOW_ROWS + token // WINDOW_COLUMNS + shift_rows
    column = (window % across) * WINDOW_COLUMNS + token % WINDOW_COLUMNS + shift_columns
    below = row >= down * WINDOW_ROWS  # the shift brings them from the other side of the padded map
    beyond = column >= across * WINDOW_COLUMNS
    row = tl.where(below, row - down * WINDOW_ROWS, row)
    column = tl.where(beyond, column - across * WINDOW_COLUMNS, column)
    real = (token < WINDOW_ROWS * WINDOW_COLUMNS) & (row < height) & (column < width)
    index = (tl.cast(image, tl.int64) * height + row) * width + column
    return index, real, 2 * below.to(tl.int32) + beyond.to(tl.int32)


@triton.jit
def load(pointer, index, real, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[T, BLOCK_D], zeros for tokens that are not there and behind head_dim."""
    channel = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(pointer + index[:, None] * STRIDE + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store(pointer, x, index, real, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load`, in the pointer's type."""
    channel = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(pointer + index[:, None] * STRIDE + channel[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_table(pointer, row, column, ROW: tl.constexpr, COLUMN: tl.constexpr, TOKENS: tl.constexpr):
    """Of one head's bias [TOKENS, TOKENS], as float32: entries row * ROW + column * COLUMN."""
    mask = (row < TOKENS)[:, None] & (column < TOKENS)[None, :]
    return tl.load(pointer + row[:, None] * ROW + column[None, :] * COLUMN, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def scores_of(
    a, b, table, a_region, b_region, scale, BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """a [M, D], b [N, D], queries and keys or the reverse -> scores [M, N], -inf where the regions differ."""
    scores = dot(a, tl.trans(b), PRECISION) * scale
    if BIASED:
        scores += table
    if MASKED:
        scores = tl.where(a_region[:, None] == b_region[None, :], scores, float("-inf"))
    return scores


@triton.jit
def finite(largest):
    """Of a row without keys the largest score is -inf: subtracting 0 instead leaves weights of 0, not NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)
