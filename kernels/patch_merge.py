"""Triton kernels of patch merging: matrix products over neighbourhoods that are never copied out of the map.

With W' the weights times LayerNorm's and v the rest that does not depend on x, an output is W' rstd (x - mean) + v.
Statistics come first, so that what is multiplied is normalised, and within the range of any type. Their sums are of
x - a and of its square, a the mean of channels of a token in the neighbourhood: a large mean of x cancels before
anything is squared.

The backward pass: patch_merge_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .tile_table import family_of, launch_options, nearest

STATISTICS_ROWS = 32  # that a program finds the statistics of
# integers whose value or divisibility must not compile another kernel
SIZES = ("tokens", "per_piece", "height", "width", "out_height", "out_width", "top", "left")


@triton.jit
def neighbour(token, real, row, column, height, width, out_height, out_width, top, left, STRIDE: tl.constexpr):
    """Of output tokens [T]: index in [B * H * W] of the token at (row, column) of their neighbourhoods, and whether it
    is on the map."""
    image = tl.cast(token // (out_width * out_height), tl.int64)
    row += token // out_width % out_height * STRIDE - top
    column += token % out_width * STRIDE - left
    inside = real & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (image * height + row) * width + column, inside


@triton.jit
def load_rows(pointer, index, real, first, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """[T, BLOCK]: of rows of CHANNELS numbers those from `first` on, zeros where there are none."""
    channel = first + tl.arange(0, BLOCK)
    mask = real[:, None]
    if CHANNELS % BLOCK != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(pointer + index[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_weights(pointer, first, tap, channel, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL: tl.constexpr,
                 BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """[BLOCK_O, BLOCK_C] of the folded weights [OUTPUTS, KERNEL * KERNEL, CHANNELS]."""
    output = first + tl.arange(0, BLOCK_O)
    index = tl.cast(output, tl.int64) * (KERNEL * KERNEL) + tap
    return load_rows(pointer, index, output < OUTPUTS, channel, CHANNELS, BLOCK_C)


# --------------------------------------------------------------------------- forward


@triton.jit
def patch_merge_fold_kernel(
    weight_pointer,  # [OUTPUTS, features], features ordered (column, row, channel) if CHANNELS_LAST, else (c, r, c)
    norm_weight_pointer,  # [features]
    norm_bias_pointer,  # [features]; read only if SHIFTED
    bias_pointer,  # [OUTPUTS]; read only if BIASED
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]: weight * norm_weight
    sums_pointer,  # [2, OUTPUTS]: sums of folded over its features; weight @ norm_bias + bias
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: one output."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    output = tl.cast(tl.program_id(0), tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    shift = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, TAPS * CHANNELS, BLOCK):
        feature = first + tl.arange(0, BLOCK)  # in the order of folded
        mask = feature < TAPS * CHANNELS
        tap = feature // CHANNELS
        channel = feature % CHANNELS
        given = channel * TAPS + tap
        if CHANNELS_LAST:
            given = (tap % KERNEL * KERNEL + tap // KERNEL) * CHANNELS + channel
        weight = tl.load(weight_pointer + output * (TAPS * CHANNELS) + given, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(norm_weight_pointer + given, mask=mask, other=0.0).to(tl.float32)
        folded = (weight * factor).to(folded_pointer.dtype.element_ty)
        tl.store(folded_pointer + output * (TAPS * CHANNELS) + feature, folded, mask=mask)
        total += folded.to(tl.float32)
        if SHIFTED:
            shift += weight * tl.load(norm_bias_pointer + given, mask=mask, other=0.0).to(tl.float32)
    constant = tl.sum(shift, 0)
    if BIASED:
        constant += tl.load(bias_pointer + output).to(tl.float32)
    tl.store(sums_pointer + output, tl.sum(total, 0))
    tl.store(sums_pointer + OUTPUTS + output, constant)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_statistics_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    statistics_pointer,  # [2, B, Ho, Wo]: mean, rstd
    tokens,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    eps,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each program: BLOCK_M tokens."""
    PARTS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    FEATURES: tl.constexpr = KERNEL * KERNEL * CHANNELS
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < tokens
    channel = tl.arange(0, BLOCK_C)
    # a token that is never padding
    index, inside = neighbour(token, real, top, left, height, width, out_height, out_width, top, left, STRIDE)
    about = tl.sum(load_rows(x_pointer, index, inside, 0, CHANNELS, BLOCK_C).to(tl.float32), 1)
    about *= 1.0 / (BLOCK_C if BLOCK_C < CHANNELS else CHANNELS)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for step in range(KERNEL * KERNEL * PARTS):
        tap = step // PARTS
        start = step % PARTS * BLOCK_C
        index, inside = neighbour(
            token, real, tap // KERNEL, tap % KERNEL, height, width, out_height, out_width, top, left, STRIDE
        )
        x = load_rows(x_pointer, index, inside, start, CHANNELS, BLOCK_C).to(tl.float32) - about[:, None]
        if CHANNELS % BLOCK_C != 0:
            x = tl.where((start + channel < CHANNELS)[None, :], x, 0.0)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    mean = total * (1.0 / FEATURES)
    rstd = tl.rsqrt(tl.maximum(squares * (1.0 / FEATURES) - mean * mean, 0.0) + eps)
    tl.store(statistics_pointer + token, about + mean, mask=real)
    tl.store(statistics_pointer + tokens + token, rstd, mask=real)


@triton.jit
def normalised_product(
    x_pointer, folded_pointer, token, real, mean, rstd, first,
    height, width, out_height, out_width, top, left,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N], float32: outputs from `first` on of normalised neighbourhoods, less what they have for
    x = 0."""
    PARTS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(KERNEL * KERNEL * PARTS):
        tap = step // PARTS
        start = step % PARTS * BLOCK_C
        index, inside = neighbour(
            token, real, tap // KERNEL, tap % KERNEL, height, width, out_height, out_width, top, left, STRIDE
        )
        x = load_rows(x_pointer, index, inside, start, CHANNELS, BLOCK_C).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None]
        if CHANNELS % BLOCK_C != 0:  # weights are 0 there, but this need not be finite in 16 bits
            x = tl.where((start + tl.arange(0, BLOCK_C) < CHANNELS)[None, :], x, 0.0)
        weights = load_weights(folded_pointer, first, tap, start, OUTPUTS, CHANNELS, KERNEL, BLOCK_N, BLOCK_C)
        out += dot(x.to(weights.dtype), tl.trans(weights), PRECISION)
    return out


@triton.jit(do_not_specialize=SIZES)
def patch_merge_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]
    sums_pointer,  # [2, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    output_pointer,  # [B, Ho, Wo, OUTPUTS]
    tokens,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_N outputs of BLOCK_M tokens."""
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % BLOCKS * BLOCK_N
    real = token < tokens
    mean = tl.load(statistics_pointer + token, mask=real, other=0.0)
    rstd = tl.load(statistics_pointer + tokens + token, mask=real, other=0.0)
    out = normalised_product(
        x_pointer, folded_pointer, token, real, mean, rstd, first,
        height, width, out_height, out_width, top, left,
        CHANNELS, OUTPUTS, KERNEL, STRIDE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION,
    )  # fmt: skip
    output = first + tl.arange(0, BLOCK_N)
    out += tl.load(sums_pointer + OUTPUTS + output, mask=output < OUTPUTS, other=0.0)[None, :]
    to = output_pointer + tl.cast(token, tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(to, out.to(output_pointer.dtype.element_ty), mask=real[:, None] & (output < OUTPUTS)[None, :])


# --------------------------------------------------------------------------- launches


def channel_block(channels: int, bits: int) -> int:
    """Channels that are loaded together: up to 128 bytes, with as few lanes as possible beyond the last one."""
    sizes = [size for size in (64, 32, 16) if size * bits <= 1024]
    return min(sizes, key=lambda size: (triton.cdiv(channels, size) * size, -size))


def map_arguments(x: torch.Tensor, kernel: int, stride: int, padding: list[int]) -> dict[str, int]:
    """Sizes of the map and of the output."""
    batch, height, width, _ = x.shape
    out_height = (height + padding[0] + padding[1] - kernel) // stride + 1
    out_width = (width + padding[2] + padding[3] - kernel) // stride + 1
    return {
        "tokens": batch * out_height * out_width,
        "height": height,
        "width": width,
        "out_height": out_height,
        "out_width": out_width,
        "top": padding[0],
        "left": padding[2],
    }


def tile_arguments(name: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """Tile sizes and launch options."""
    bits = 8 * weight.element_size()
    options = launch_options(nearest(name, family_of(x.device), bits=bits, outputs=weight.shape[0]))
    return options | {"BLOCK_C": channel_block(x.shape[3], bits)}


def constant_arguments(x: torch.Tensor, weight: torch.Tensor, kernel: int, stride: int) -> dict[str, Any]:
    """What a model fixes."""
    return {
        "CHANNELS": x.shape[3],
        "OUTPUTS": weight.shape[0],
        "KERNEL": kernel,
        "STRIDE": stride,
        "PRECISION": precision(),
    }


def fold_weights(
    weight: torch.Tensor,
    kernel: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights times LayerNorm's [Cout, K*K, C], and [2, Cout]: their sums; what the output has for x = 0."""
    weight, norm_weight = weight.contiguous(), norm_weight.contiguous()
    outputs, features = weight.shape
    folded, sums = torch.empty_like(weight), weight.new_empty(2, outputs, dtype=torch.float32)
    patch_merge_fold_kernel[(outputs,)](
        weight,
        norm_weight,
        norm_weight if norm_bias is None else norm_bias.contiguous(),
        norm_weight if bias is None else bias.contiguous(),
        folded,
        sums,
        CHANNELS=features // kernel**2,
        OUTPUTS=outputs,
        KERNEL=kernel,
        CHANNELS_LAST=channels_last,
        SHIFTED=norm_bias is not None,
        BIASED=bias is not None,
        BLOCK=min(1024, triton.next_power_of_2(features)),
        enable_fp_fusion=True,
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
    channels_last: bool,
    padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch merging on a GPU: x [B, H, W, C] -> [B, Ho, Wo, Cout] in the weight's type, and [2, B, Ho, Wo], float32:
    mean and 1 / standard deviation of every neighbourhood.

    Types are float32, float16 and bfloat16. ``padding`` counts zeros above, below, to the left, to the right;
    ``channels_last`` says that features are ordered (column, row, channel), not (channel, row, column).
    """
    x, sizes = x.contiguous(), map_arguments(x, kernel, stride, padding)
    shape = (x.shape[0], sizes["out_height"], sizes["out_width"])
    output = weight.new_empty(*shape, weight.shape[0])
    statistics = weight.new_empty(2, *shape, dtype=torch.float32)
    if output.numel() == 0:
        return output, statistics
    with torch.cuda.device_of(x):
        folded, sums = fold_weights(weight, kernel, norm_weight, norm_bias, bias, channels_last)
        patch_merge_statistics_kernel[(triton.cdiv(sizes["tokens"], STATISTICS_ROWS),)](
            x, statistics, **sizes, eps=eps, CHANNELS=x.shape[3], KERNEL=kernel, STRIDE=stride,
            BLOCK_M=STATISTICS_ROWS, BLOCK_C=channel_block(x.shape[3], 8 * x.element_size()), enable_fp_fusion=True,
        )  # fmt: skip
        tiles = tile_arguments("patch_merge", x, weight)
        blocks = triton.cdiv(sizes["tokens"], tiles["BLOCK_M"]) * triton.cdiv(weight.shape[0], tiles["BLOCK_N"])
        patch_merge_kernel[(blocks,)](
            x, folded, sums, statistics, output, **sizes, **constant_arguments(x, weight, kernel, stride), **tiles
        )
    return output, statistics
