"""Shared by the kernels of patch merging, forward and backward: where neighbourhoods are, loading them, their product
with folded weights."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .dot import dot

# integers whose value or divisibility must not compile another kernel
SIZES = ("tokens", "map_tokens", "per_piece", "height", "width", "out_height", "out_width", "top", "left")


class Shape(NamedTuple):
    """Constants that a kernel is compiled for."""

    channels: int
    outputs: int
    kernel: int  # tokens along each side of a neighbourhood
    stride: int
    precision: str  # of float32 products
    RAW: bool  # whether x is multiplied as it is, where that is exact enough: x and weights have the same 16 bits


class Sizes(NamedTuple):
    """Sizes of the map and of the output, in tokens."""

    tokens: tl.tensor  # B * out_height * out_width
    height: tl.tensor
    width: tl.tensor
    out_height: tl.tensor
    out_width: tl.tensor
    top: tl.tensor  # zeros
    left: tl.tensor


class Places(NamedTuple):
    """The first tokens of T neighbourhoods, which may be padding."""

    row: tl.tensor  # [T]; below the map where there is no neighbourhood
    column: tl.tensor  # [T]
    index: tl.tensor  # [T], in [B * H * W]


@triton.jit
def locate(token, real, sizes, SHAPE: tl.constexpr):
    """Places of the neighbourhoods of output tokens [T]."""
    image = token // (sizes.out_width * sizes.out_height)
    return place(image, token // sizes.out_width % sizes.out_height, token % sizes.out_width, real, sizes, SHAPE)


@triton.jit
def place(image, out_row, out_column, real, sizes, SHAPE: tl.constexpr):
    """The same for output tokens at these rows and columns of images [T]."""
    row = out_row * SHAPE.stride - sizes.top
    column = out_column * SHAPE.stride - sizes.left
    index = tl.cast(image * sizes.height + row, tl.int64) * sizes.width + column
    return Places(tl.where(real, row, sizes.height), column, index)


@triton.jit
def on_map(places, down, right, height, width):
    """[...]: whether what is `down` and `right` [...] of places [T] is on a map of that size."""
    row = places.row + down
    column = places.column + right
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def across(places):
    """Places [T] as [T, 1]."""
    return Places(places.row[:, None], places.column[:, None], places.index[:, None])


@triton.jit
def load_neighbourhoods(x_pointer, places, feature, sizes, SHAPE: tl.constexpr):
    """[T, N]: features [N], ordered (row, column, channel), of neighbourhoods; zeros where there are none. A row of a
    neighbourhood is contiguous in memory."""
    SPAN: tl.constexpr = SHAPE.kernel * SHAPE.channels
    FEATURES: tl.constexpr = SHAPE.kernel * SPAN
    down = feature // SPAN
    right = feature // SHAPE.channels % SHAPE.kernel
    mask = on_map(across(places), down[None, :], right[None, :], sizes.height, sizes.width)
    if tl.constexpr(FEATURES) % feature.shape[0] != 0:
        mask = mask & (feature < FEATURES)[None, :]
    offset = tl.cast(down, tl.int64) * sizes.width * SHAPE.channels + feature % SPAN
    return tl.load(x_pointer + (places.index * SHAPE.channels)[:, None] + offset[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(pointer, index, real, column, WIDTH: tl.constexpr):
    """[T, N]: columns [N] of rows of WIDTH numbers, zeros where there are none."""
    mask = real[:, None]
    if tl.constexpr(WIDTH) % column.shape[0] != 0:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(pointer + (tl.cast(index, tl.int64) * WIDTH)[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_sums(sums_pointer, row, output, SHAPE: tl.constexpr):
    """[N]: of sums [3, OUTPUTS] a row, for outputs [N]."""
    return tl.load(sums_pointer + row * SHAPE.outputs + output, mask=output < SHAPE.outputs, other=0.0)


@triton.jit
def load_statistics(pointer, token, real, sizes):
    """mean and rstd [T] of neighbourhoods, from [2, tokens]."""
    mean = tl.load(pointer + token, mask=real, other=0.0)
    return mean, tl.load(pointer + sizes.tokens + token, mask=real, other=0.0)


# --------------------------------------------------------------------------- product


@triton.jit
def sum_features(
    x_pointer, folded_pointer, places, mean, rstd, output, sizes,
    BLOCK_K: tl.constexpr, RAW: tl.constexpr, STAGES: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """[T, N], float32: folded weights of outputs [N] times neighbourhoods, as they are if RAW, else normalised."""
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    total = tl.zeros([mean.shape[0], output.shape[0]], dtype=tl.float32)
    for start in tl.range(0, FEATURES, BLOCK_K, num_stages=STAGES):
        feature = start + tl.arange(0, BLOCK_K)
        x = load_neighbourhoods(x_pointer, places, feature, sizes, SHAPE)
        weights = load_rows(folded_pointer, output, output < SHAPE.outputs, feature, FEATURES)
        if not RAW:
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if FEATURES % BLOCK_K != 0:  # weights are 0 there, but this need not be finite in 16 bits
                x = tl.where((feature < FEATURES)[None, :], x, 0.0)
        total += dot(x.to(weights.dtype), tl.trans(weights), tl.constexpr(SHAPE.precision))
    return total


@triton.jit
def normalised_product(
    x_pointer, folded_pointer, sums_pointer, places, mean, rstd, output, sizes,
    BLOCK_K: tl.constexpr, SHAPE: tl.constexpr, LIMIT: tl.constexpr = 16.0,
):  # fmt: skip
    """[T, N], float32: outputs [N] of neighbourhoods, less what they have for x = 0.

    The sums over x as it is carry its mean, which folded weights cancel at the end only. Rounded towards 0 as tensor
    cores do it, they lose up to 2^-25 mean rstd in every of a few hundred steps: LIMIT keeps that far below float16's
    2^-12. A block with a neighbourhood beyond it (a constant one, say) normalises x in registers, as does float32.
    """
    if SHAPE.RAW:
        if tl.max(tl.abs(mean) * rstd, 0) <= LIMIT:
            value = sum_features(
                x_pointer, folded_pointer, places, mean, rstd, output, sizes, BLOCK_K, True, None, SHAPE
            )  # fmt: skip
            value = (value - mean[:, None] * load_sums(sums_pointer, 0, output, SHAPE)[None, :]) * rstd[:, None]
        else:
            value = sum_features(
                x_pointer, folded_pointer, places, mean, rstd, output, sizes, BLOCK_K, False, 1, SHAPE
            )  # fmt: skip
    else:
        value = sum_features(
            x_pointer, folded_pointer, places, mean, rstd, output, sizes, BLOCK_K, False, None, SHAPE
        )  # fmt: skip
    return value * tl.load(sums_pointer + 2 * SHAPE.outputs)
