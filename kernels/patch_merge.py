"""Triton kernels of patch merging: matrix products over neighbourhoods that are never copied out of the map.

With W' the weights times LayerNorm's and v the rest that does not depend on x, an output is W' rstd (x - mean) + v.
Statistics come first, so that what is multiplied is normalised, and within the range of any type. Their sums are of
x - a and of its square, a the mean of channels of a token in the neighbourhood: a large mean of x cancels before
anything is squared.

The backward pass: patch_merge_backward.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .launch import Launch, device_guard
from .tile_table import choose, family_of, once_per_shape

STATISTICS_ROWS = 32  # that a program finds the statistics of
# integers whose value or divisibility must not compile another kernel
SIZES = ("tokens", "per_piece", "height", "width", "out_height", "out_width", "top", "left")


class Shape(NamedTuple):
    """Constants that a kernel is compiled for."""

    channels: int
    outputs: int
    kernel: int  # tokens along each side of a neighbourhood
    stride: int
    precision: str  # of float32 products


class Sizes(NamedTuple):
    """Sizes of the map and of the output, in tokens."""

    tokens: tl.tensor  # B * out_height * out_width
    height: tl.tensor
    width: tl.tensor
    out_height: tl.tensor
    out_width: tl.tensor
    top: tl.tensor  # zeros
    left: tl.tensor


@triton.jit
def neighbour(token, real, row, column, sizes, SHAPE: tl.constexpr):
    """Indices in [B * H * W] of the tokens at (row, column) of the neighbourhoods of output tokens [T], and whether
    they are on the map."""
    image = tl.cast(token // (sizes.out_width * sizes.out_height), tl.int64)
    row += token // sizes.out_width % sizes.out_height * SHAPE.stride - sizes.top
    column += token % sizes.out_width * SHAPE.stride - sizes.left
    inside = real & (row >= 0) & (row < sizes.height) & (column >= 0) & (column < sizes.width)
    return (image * sizes.height + row) * sizes.width + column, inside


@triton.jit
def load_rows(pointer, index, real, first, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """[T, BLOCK]: of rows of CHANNELS numbers those from `first` on, zeros where there are none."""
    channel = first + tl.arange(0, BLOCK)
    mask = real[:, None]
    if CHANNELS % BLOCK != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(pointer + index[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_weights(pointer, first, tap, channel, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, SHAPE: tl.constexpr):
    """[BLOCK_O, BLOCK_C] of the folded weights [OUTPUTS, TAPS, CHANNELS]."""
    output = first + tl.arange(0, BLOCK_O)
    index = tl.cast(output, tl.int64) * (SHAPE.kernel * SHAPE.kernel) + tap
    return load_rows(pointer, index, output < SHAPE.outputs, channel, SHAPE.channels, BLOCK_C)


@triton.jit
def load_statistics(pointer, token, real, sizes):
    """mean and rstd [T] of neighbourhoods, from [2, tokens]."""
    mean = tl.load(pointer + token, mask=real, other=0.0)
    return mean, tl.load(pointer + sizes.tokens + token, mask=real, other=0.0)


# --------------------------------------------------------------------------- forward


@triton.jit
def patch_merge_fold_kernel(
    weight_pointer,  # [OUTPUTS, features], "timm" ordered (column, row, channel), "unfold" (channel, row, column)
    norm_weight_pointer,  # [features]
    norm_bias_pointer,  # [features]; read only if HAS_NORM_BIAS
    bias_pointer,  # [OUTPUTS]; read only if HAS_BIAS
    folded_pointer,  # [OUTPUTS, TAPS, CHANNELS]: weight * norm_weight
    sums_pointer,  # [2, OUTPUTS]: sums of folded over its features; weight @ norm_bias + bias
    SHAPE: tl.constexpr, FEATURE_ORDER: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program: one output."""
    TAPS: tl.constexpr = SHAPE.kernel * SHAPE.kernel
    output = tl.cast(tl.program_id(0), tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    shift = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, TAPS * SHAPE.channels, BLOCK):
        feature = first + tl.arange(0, BLOCK)  # in the order of folded
        mask = feature < TAPS * SHAPE.channels
        tap = feature // SHAPE.channels
        channel = feature % SHAPE.channels
        given = channel * TAPS + tap
        if FEATURE_ORDER == "timm":
            given = (tap % SHAPE.kernel * SHAPE.kernel + tap // SHAPE.kernel) * SHAPE.channels + channel
        weight = tl.load(weight_pointer + output * (TAPS * SHAPE.channels) + given, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(norm_weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        folded = (weight * factor).to(folded_pointer.dtype.element_ty)
        tl.store(folded_pointer + output * (TAPS * SHAPE.channels) + feature, folded, mask=mask)
        total += folded.to(tl.float32)
        if HAS_NORM_BIAS:
            shift += weight * tl.load(norm_bias_pointer + given, mask=mask, other=0.0).to(tl.float32)
    constant = tl.sum(shift, 0)
    if HAS_BIAS:
        constant += tl.load(bias_pointer + output).to(tl.float32)
    tl.store(sums_pointer + output, tl.sum(total, 0))
    tl.store(sums_pointer + SHAPE.outputs + output, constant)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_statistics_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    statistics_pointer,  # [2, B, Ho, Wo]: mean, rstd
    tokens, height, width, out_height, out_width, top, left, eps,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_M tokens."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    PARTS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < tokens
    channel = tl.arange(0, BLOCK_C)
    # a token that is never padding
    index, inside = neighbour(token, real, top, left, sizes, SHAPE)
    about = tl.sum(load_rows(x_pointer, index, inside, 0, SHAPE.channels, BLOCK_C).to(tl.float32), 1)
    about *= 1.0 / (BLOCK_C if SHAPE.channels > BLOCK_C else SHAPE.channels)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for step in range(SHAPE.kernel * SHAPE.kernel * PARTS):
        tap = step // PARTS
        start = step % PARTS * BLOCK_C
        index, inside = neighbour(token, real, tap // SHAPE.kernel, tap % SHAPE.kernel, sizes, SHAPE)
        x = load_rows(x_pointer, index, inside, start, SHAPE.channels, BLOCK_C).to(tl.float32) - about[:, None]
        if SHAPE.channels % BLOCK_C != 0:
            x = tl.where((start + channel < SHAPE.channels)[None, :], x, 0.0)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    mean = total * (1.0 / FEATURES)
    rstd = tl.rsqrt(tl.maximum(squares * (1.0 / FEATURES) - mean * mean, 0.0) + eps)
    tl.store(statistics_pointer + token, about + mean, mask=real)
    tl.store(statistics_pointer + tokens + token, rstd, mask=real)


@triton.jit
def normalised_product(
    x_pointer, folded_pointer, token, real, mean, rstd, first, sizes,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N], float32: outputs from `first` on of normalised neighbourhoods, less what they have for
    x = 0."""
    PARTS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(SHAPE.kernel * SHAPE.kernel * PARTS):
        tap = step // PARTS
        start = step % PARTS * BLOCK_C
        index, inside = neighbour(token, real, tap // SHAPE.kernel, tap % SHAPE.kernel, sizes, SHAPE)
        x = load_rows(x_pointer, index, inside, start, SHAPE.channels, BLOCK_C).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None]
        if SHAPE.channels % BLOCK_C != 0:  # weights are 0 there, but this need not be finite in 16 bits
            x = tl.where((start + tl.arange(0, BLOCK_C) < SHAPE.channels)[None, :], x, 0.0)
        weights = load_weights(folded_pointer, first, tap, start, BLOCK_N, BLOCK_C, SHAPE)
        out += dot(x.to(weights.dtype), tl.trans(weights), tl.constexpr(SHAPE.precision))
    return out


@triton.jit(do_not_specialize=SIZES)
def patch_merge_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, TAPS, CHANNELS]
    sums_pointer,  # [2, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    output_pointer,  # [B, Ho, Wo, OUTPUTS]
    tokens, height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N outputs of BLOCK_M tokens."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    BLOCKS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % BLOCKS * BLOCK_N
    real = token < tokens
    mean, rstd = load_statistics(statistics_pointer, token, real, sizes)
    out = normalised_product(
        x_pointer, folded_pointer, token, real, mean, rstd, first,
        sizes, BLOCK_M, BLOCK_N, BLOCK_C, SHAPE,
    )  # fmt: skip
    output = first + tl.arange(0, BLOCK_N)
    out += tl.load(sums_pointer + SHAPE.outputs + output, mask=output < SHAPE.outputs, other=0.0)[None, :]
    to = output_pointer + tl.cast(token, tl.int64)[:, None] * SHAPE.outputs + output[None, :]
    tl.store(to, out.to(output_pointer.dtype.element_ty), mask=real[:, None] & (output < SHAPE.outputs)[None, :])


# --------------------------------------------------------------------------- decided once for a shape


def channel_block(channels: int, bits: int) -> int:
    """Channels that are loaded together: up to 128 bytes, with as few lanes as possible beyond the last one."""
    sizes = [size for size in (64, 32, 16) if size * bits <= 1024]
    return min(sizes, key=lambda size: (triton.cdiv(channels, size) * size, -size))


class Problem(NamedTuple):
    """Everything that decides how a merging is launched."""

    size: tuple[int, ...]  # of x, [B, H, W, C]
    outputs: int
    kernel: int
    stride: int
    padding: tuple[int, ...]  # zeros above, below, to the left, to the right
    x_dtype: torch.dtype
    dtype: torch.dtype  # of the weight
    device: torch.device
    precision: str

    @property
    def output_size(self) -> tuple[int, int, int]:
        """[B, Ho, Wo]"""
        batch, height, width, _ = self.size
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.kernel) // self.stride + 1
        return batch, rows, (width + left + right - self.kernel) // self.stride + 1

    @property
    def shape(self) -> Shape:
        return Shape(self.size[3], self.outputs, self.kernel, self.stride, self.precision)

    def arguments(self) -> dict[str, Any]:
        """Arguments of all kernels but that of the weights, besides tensors, by name."""
        batch, rows, columns = self.output_size
        top, _, left, _ = self.padding
        sizes = Sizes(batch * rows * columns, *self.size[1:3], rows, columns, top, left)
        return sizes._asdict() | {"SHAPE": self.shape}

    def tiles(self, kernel: str) -> dict[str, Any]:
        """BLOCK_M tokens, BLOCK_N outputs, BLOCK_C channels and Triton's options."""
        bits = 8 * self.dtype.itemsize
        options = choose(kernel, family_of(self.device), bits=bits, outputs=self.outputs)
        return options | {"BLOCK_C": channel_block(self.size[3], bits)}

    def fold(self) -> Launch:
        """Launch for the folded weights: a program for each output."""
        features = self.kernel**2 * self.size[3]
        block = min(1024, triton.next_power_of_2(features))
        return (self.outputs,), {"SHAPE": self.shape, "BLOCK": block, "enable_fp_fusion": True}


@once_per_shape
def _launches(problem: Problem) -> tuple[Launch, Launch, Launch]:
    """Launches for the folded weights, the statistics and the output."""
    arguments, tiles = problem.arguments(), problem.tiles("patch_merge")
    block_c = channel_block(problem.size[3], 8 * problem.x_dtype.itemsize)
    tokens = arguments["tokens"]
    statistics = arguments | {"BLOCK_M": STATISTICS_ROWS, "BLOCK_C": block_c, "enable_fp_fusion": True}
    blocks = triton.cdiv(tokens, tiles["BLOCK_M"]) * triton.cdiv(problem.outputs, tiles["BLOCK_N"])
    return problem.fold(), ((triton.cdiv(tokens, STATISTICS_ROWS),), statistics), ((blocks,), arguments | tiles)


# --------------------------------------------------------------------------- launches


def fold_weights(
    launch: Launch,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_order: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights times LayerNorm's [Cout, K*K, C], and [2, Cout]: their sums; what the output has for x = 0."""
    grid, arguments = launch
    weight, norm_weight = weight.contiguous(), norm_weight.contiguous()
    folded, sums = torch.empty_like(weight), weight.new_empty((2, weight.shape[0]), dtype=torch.float32)
    patch_merge_fold_kernel[grid](
        weight,
        norm_weight,
        norm_weight if norm_bias is None else norm_bias.contiguous(),
        norm_weight if bias is None else bias.contiguous(),
        folded,
        sums,
        FEATURE_ORDER=feature_order,
        HAS_NORM_BIAS=norm_bias is not None,
        HAS_BIAS=bias is not None,
        **arguments,
    )
    return folded, sums


def patch_merge(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    feature_order: str,
    padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch merging on a GPU: x [B, H, W, C] -> [B, Ho, Wo, Cout] in the weight's type, and [2, B, Ho, Wo], float32:
    mean and 1 / standard deviation of every neighbourhood.

    Types are float32, float16 and bfloat16. ``padding`` counts zeros above, below, to the left, to the right;
    ``feature_order`` is "unfold", (channel, row, column), or "timm", (column, row, channel).
    """
    x = x.contiguous()
    problem = Problem(
        x.shape, weight.shape[0], kernel, stride, (*padding,), x.dtype, weight.dtype, x.device, precision(weight.dtype)
    )
    size = problem.output_size
    output = weight.new_empty((*size, weight.shape[0]))
    statistics = weight.new_empty((2, *size), dtype=torch.float32)
    if output.numel() == 0:
        return output, statistics
    fold, (statistics_grid, statistics_arguments), (grid, arguments) = _launches(problem)
    with device_guard(x):
        folded, sums = fold_weights(fold, weight, norm_weight, norm_bias, bias, feature_order)
        patch_merge_statistics_kernel[statistics_grid](x, statistics, eps=eps, **statistics_arguments)
        patch_merge_kernel[grid](x, folded, sums, statistics, output, **arguments)
    return output, statistics
