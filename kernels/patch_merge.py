"""Triton kernels of patch merging: matrix products over neighbourhoods that are never copied out of the map.

With W' the weights times LayerNorm's and v the rest that does not depend on x, an output is W' rstd (x - mean) + v. As
x - mean sums to 0, any number may be taken from a row of W': here its mean is, so that W' x = W' (x - mean) but for
rounding, and the sum over x itself, in the type that it has in memory, is all that the loop of the product does.
Statistics come from mean and variance of each token, found once (Chan, Golub and LeVeque, The American Statistician
37, 1983): a large mean cancels before anything is squared.

The backward pass: patch_merge_backward.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dot import precision
from .launch import Launcher
from .patch_merge_tiles import (
    SIZES,
    Shape,
    Sizes,
    across,
    load_rows,
    load_sums,
    locate,
    normalised_product,
    on_map,
)
from .tile_table import choose, family_of, once_per_shape

MAXIMUM_MOMENTS_BLOCK = 1024  # channels of a token that are loaded together for its mean and variance


# --------------------------------------------------------------------------- before the product


@triton.jit
def given_order(feature, FEATURE_ORDER: tl.constexpr, SHAPE: tl.constexpr):
    """Indices in the order that weights are given in, of features ordered (row, column, channel)."""
    TAPS: tl.constexpr = SHAPE.kernel * SHAPE.kernel
    tap = feature // SHAPE.channels
    channel = feature % SHAPE.channels
    if FEATURE_ORDER == "timm":
        return (tap % SHAPE.kernel * SHAPE.kernel + tap // SHAPE.kernel) * SHAPE.channels + channel
    return channel * TAPS + tap


@triton.jit
def fold(
    output, weight_pointer, norm_weight_pointer, norm_bias_pointer, bias_pointer, folded_pointer, sums_pointer,
    SHAPE: tl.constexpr, FEATURE_ORDER: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of one output times LayerNorm's, less their mean and divided by the power of two below LayerNorm's
    largest, so that 16 bits neither overflow nor lose what is small."""
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    weight_pointer += tl.cast(output, tl.int64) * FEATURES
    folded_pointer += tl.cast(output, tl.int64) * FEATURES
    total = tl.zeros([BLOCK], dtype=tl.float32)
    shift = tl.zeros([BLOCK], dtype=tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, FEATURES, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        mask = feature < FEATURES
        given = given_order(feature, FEATURE_ORDER, SHAPE)
        weight = tl.load(weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(norm_weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        total += weight * factor
        largest = tl.maximum(largest, tl.abs(factor))
        if HAS_NORM_BIAS:
            shift += weight * tl.load(norm_bias_pointer + given, mask=mask, other=0.0).to(tl.float32)
    constant = tl.sum(shift, 0)
    if HAS_BIAS:
        constant += tl.load(bias_pointer + output).to(tl.float32)
    # powers of two by their exponents, whose sum is 254 in a number and its inverse
    exponent = tl.minimum(tl.maximum(tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    mean = tl.sum(total, 0) * (1.0 / FEATURES)
    rest = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, FEATURES, BLOCK):
        feature = first + tl.arange(0, BLOCK)
        mask = feature < FEATURES
        given = given_order(feature, FEATURE_ORDER, SHAPE)
        weight = tl.load(weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(norm_weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        folded = ((weight * factor - mean) * inverse).to(folded_pointer.dtype.element_ty)
        tl.store(folded_pointer + feature, folded, mask=mask)
        rest += tl.where(mask, folded.to(tl.float32), 0.0)
    tl.store(sums_pointer + output, tl.sum(rest, 0))
    tl.store(sums_pointer + SHAPE.outputs + output, constant)
    tl.store(sums_pointer + 2 * SHAPE.outputs + output, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def find_moments(
    token, real, x_pointer, moments_pointer, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and variance over the channels of tokens [T] of the map."""
    CHANNELS: tl.constexpr = SHAPE.channels
    x = load_rows(x_pointer, token, real, tl.arange(0, BLOCK), CHANNELS).to(tl.float32)
    about = tl.sum(x, 1) * (1.0 / (BLOCK if CHANNELS > BLOCK else CHANNELS))  # [T]
    total = tl.zeros_like(about)
    squares = tl.zeros_like(about)
    for first in range(0, CHANNELS, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        x = load_rows(x_pointer, token, real, channel, CHANNELS).to(tl.float32) - about[:, None]
        if CHANNELS % BLOCK != 0:
            x = tl.where((channel < CHANNELS)[None, :], x, 0.0)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    mean = total * (1.0 / CHANNELS)
    to = moments_pointer + 2 * tl.cast(token, tl.int64)
    tl.store(to, about + mean, mask=real)
    tl.store(to + 1, squares * (1.0 / CHANNELS) - mean * mean, mask=real)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_prepare_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    weight_pointer,  # [OUTPUTS, features], "timm" ordered (column, row, channel), "unfold" (channel, row, column)
    norm_weight_pointer,  # [features]
    norm_bias_pointer,  # [features]; read only if HAS_NORM_BIAS
    bias_pointer,  # [OUTPUTS]; read only if HAS_BIAS
    folded_pointer,  # [OUTPUTS, features], ordered (row, column, channel)
    sums_pointer,  # [3, OUTPUTS]: sums of folded; weight @ norm_bias + bias; what folded was divided by
    moments_pointer,  # [B, H, W, 2]: mean and variance over channels
    map_tokens,  # B * H * W, or 0 where nobody needs their moments
    SHAPE: tl.constexpr, FEATURE_ORDER: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: the folded weights of one output, or the moments of BLOCK_M tokens."""
    program = tl.program_id(0)
    if program < SHAPE.outputs:
        fold(
            program, weight_pointer, norm_weight_pointer, norm_bias_pointer, bias_pointer, folded_pointer,
            sums_pointer, SHAPE, FEATURE_ORDER, HAS_NORM_BIAS, HAS_BIAS, BLOCK,
        )  # fmt: skip
    else:
        token = (program - SHAPE.outputs) * BLOCK_M + tl.arange(0, BLOCK_M)
        find_moments(token, token < map_tokens, x_pointer, moments_pointer, SHAPE, BLOCK_C)


# --------------------------------------------------------------------------- product


@triton.jit
def combine_moments(moments_pointer, places, sizes, eps, SHAPE: tl.constexpr, COLUMNS: tl.constexpr):
    """mean and rstd [T] of neighbourhoods from the moments of tokens, padding included, which has mean and variance 0.
    About the mean of a token that is never padding, where means of tokens are far from 0 but near each other."""
    TAPS: tl.constexpr = SHAPE.kernel * SHAPE.kernel
    real = places.row < sizes.height
    middle = places.index + tl.cast(sizes.top, tl.int64) * sizes.width + sizes.left
    about = tl.load(moments_pointer + 2 * middle, mask=real, other=0.0)
    total = tl.zeros_like(about)
    squares = tl.zeros_like(about)
    right = tl.arange(0, COLUMNS)
    for down in tl.static_range(tl.constexpr(SHAPE.kernel)):
        inside = on_map(across(places), down, right[None, :], sizes.height, sizes.width)
        inside = inside & (right < SHAPE.kernel)[None, :]
        to = moments_pointer + 2 * (places.index + tl.cast(sizes.width, tl.int64) * down)[:, None] + 2 * right[None, :]
        mean = tl.load(to, mask=inside, other=0.0) - about[:, None]
        mean = tl.where((right < SHAPE.kernel)[None, :], mean, 0.0)
        variance = tl.load(to + 1, mask=inside, other=0.0)
        total += tl.sum(mean, 1)
        squares += tl.sum(mean * mean + variance, 1)
    mean = total * (1.0 / TAPS)
    return about + mean, tl.rsqrt(tl.maximum(squares * (1.0 / TAPS) - mean * mean, 0.0) + eps)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, features]
    sums_pointer,  # [3, OUTPUTS]
    moments_pointer,  # [B, H, W, 2]
    statistics_pointer,  # [2, B, Ho, Wo]: mean, rstd
    output_pointer,  # [B, Ho, Wo, OUTPUTS]
    tokens, height, width, out_height, out_width, top, left, eps,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N outputs of BLOCK_M tokens; of the first outputs, their statistics, too."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    BLOCKS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % BLOCKS * BLOCK_N
    real = token < tokens
    places = locate(token, real, sizes, SHAPE)
    mean, rstd = combine_moments(moments_pointer, places, sizes, eps, SHAPE, COLUMNS)
    if first == 0:
        tl.store(statistics_pointer + token, mean, mask=real)
        tl.store(statistics_pointer + tokens + token, rstd, mask=real)
    mean, rstd = tl.where(real, mean, 0.0), tl.where(real, rstd, 0.0)
    output = first + tl.arange(0, BLOCK_N)
    out = normalised_product(
        x_pointer, folded_pointer, sums_pointer, places, mean, rstd, output, sizes, BLOCK_K, SHAPE
    )  # fmt: skip
    out += load_sums(sums_pointer, 1, output, SHAPE)[None, :]
    to = output_pointer + (tl.cast(token, tl.int64) * SHAPE.outputs)[:, None] + output[None, :]
    tl.store(to, out.to(output_pointer.dtype.element_ty), mask=real[:, None] & (output < SHAPE.outputs)[None, :])


# --------------------------------------------------------------------------- decided once for a shape


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
    feature_order: str
    has_norm_bias: bool
    has_bias: bool

    @property
    def output_size(self) -> tuple[int, int, int]:
        """[B, Ho, Wo]"""
        batch, height, width, _ = self.size
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.kernel) // self.stride + 1
        return batch, rows, (width + left + right - self.kernel) // self.stride + 1

    @property
    def features(self) -> int:
        """Of a neighbourhood."""
        return self.kernel**2 * self.size[3]

    @property
    def shape(self) -> Shape:
        raw = self.x_dtype == self.dtype and self.dtype.itemsize == 2
        return Shape(self.size[3], self.outputs, self.kernel, self.stride, self.precision, raw)

    def arguments(self) -> dict[str, Any]:
        """Arguments of all kernels after the first, besides tensors, by name."""
        batch, rows, columns = self.output_size
        _, height, width, _ = self.size
        top, _, left, _ = self.padding
        sizes = Sizes(batch * rows * columns, height, width, rows, columns, top, left)
        return sizes._asdict() | {"SHAPE": self.shape}

    def tiles(self, kernel: str) -> dict[str, Any]:
        """BLOCK_M tokens, BLOCK_N outputs, BLOCK_K of what is summed over, and Triton's options."""
        bits = 8 * self.dtype.itemsize
        return choose(kernel, family_of(self.device), bits=bits, outputs=self.outputs)

    def prepare(self, moments: bool) -> Launcher:
        """Of the folded weights, a program for each output, and if wanted the moments of tokens after them."""
        map_tokens = self.size[0] * self.size[1] * self.size[2] if moments else 0
        block_c = min(triton.next_power_of_2(self.size[3]), MAXIMUM_MOMENTS_BLOCK)
        block_m = MAXIMUM_MOMENTS_BLOCK * 4 // block_c
        arguments = self.order() | {
            "map_tokens": map_tokens,
            "BLOCK": min(1024, triton.next_power_of_2(self.features)),
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
            "enable_fp_fusion": True,
        }
        return Launcher(patch_merge_prepare_kernel, (self.outputs + triton.cdiv(map_tokens, block_m),), arguments)

    def order(self) -> dict[str, Any]:
        """Constants of the kernels that read the parameters or write their gradients."""
        flags = {"HAS_NORM_BIAS": self.has_norm_bias, "HAS_BIAS": self.has_bias}
        return {"SHAPE": self.shape, "FEATURE_ORDER": self.feature_order} | flags


def output_block(outputs: int, widest: int) -> int:
    """Outputs that a program has: `widest`, or half of a tile of 256 where less of it is empty then."""
    return 128 if widest == 256 and triton.cdiv(outputs, 128) % 2 else widest


def problem_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    padding: list[int],
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_order: str,
) -> Problem:
    """The problem of these operands, as torch's switches of precision are now."""
    return Problem(
        x.shape, weight.shape[0], kernel, stride, (*padding,), x.dtype, weight.dtype, x.device, precision(weight.dtype),
        feature_order, norm_bias is not None, bias is not None,
    )  # fmt: skip


@once_per_shape
def _launchers(problem: Problem) -> tuple[tuple[int, int, int], Launcher, Launcher]:
    """The output's size; what precedes the product, and the product."""
    arguments = problem.arguments() | problem.tiles("patch_merge")
    arguments["BLOCK_N"] = output_block(problem.outputs, arguments["BLOCK_N"])
    blocks = triton.cdiv(arguments["tokens"], arguments["BLOCK_M"]) * triton.cdiv(problem.outputs, arguments["BLOCK_N"])
    arguments["COLUMNS"] = triton.next_power_of_2(problem.kernel)
    return problem.output_size, problem.prepare(True), Launcher(patch_merge_kernel, (blocks,), arguments)


# --------------------------------------------------------------------------- launches


def prepare(
    start: Launcher,
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Folded weights [Cout, K*K*C], and [3, Cout]: their sums; what the output has for x = 0; their unit. Fills moments
    [B, H, W, 2] if the launcher is for them."""
    weight, norm_weight = weight.contiguous(), norm_weight.contiguous()
    folded, sums = torch.empty_like(weight), weight.new_empty((3, weight.shape[0]), dtype=torch.float32)
    start(
        x,
        weight,
        norm_weight,
        norm_weight if norm_bias is None else norm_bias.contiguous(),
        norm_weight if bias is None else bias.contiguous(),
        folded,
        sums,
        moments,
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
    size, first, second = _launchers(problem_of(x, weight, kernel, stride, padding, norm_bias, bias, feature_order))
    output = weight.new_empty((*size, weight.shape[0]))
    statistics = weight.new_empty((2, *size), dtype=torch.float32)
    if output.numel() == 0:
        return output, statistics
    moments = statistics.new_empty((*x.shape[:3], 2))
    folded, sums = prepare(first, x, moments, weight, norm_weight, norm_bias, bias)
    second(x, folded, sums, moments, statistics, output, eps=float(eps))
    return output, statistics
