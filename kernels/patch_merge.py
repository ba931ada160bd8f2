"""Triton kernels of patch merging: matrix products over neighbourhoods that are never copied out of the map.

With W' the weights times LayerNorm's, u their sums over the features and v the rest that does not depend on x, an
output is rstd (W' (x - a) - (mean - a) u) + v for any number a: sums of x - a and its square come with the product. a is
the mean of channels of a token in the neighbourhood, so that a large mean of x cancels before anything is squared.

Backward, g the gradient of the output: each input token gathers from the neighbourhoods that hold it, and g^T x comes
in pieces, which are added in a fixed order. No float atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import choose, family_of
from .window_tiles import dot

PROGRAMS = 1024  # that sums over all tokens are cut into: a few for every multiprocessor
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
def patch_merge_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]
    sums_pointer,  # [2, OUTPUTS]
    output_pointer,  # [B, Ho, Wo, OUTPUTS]
    mean_pointer,  # [B, Ho, Wo]
    rstd_pointer,  # [B, Ho, Wo]
    tokens,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    eps,
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
    PARTS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    FEATURES: tl.constexpr = KERNEL * KERNEL * CHANNELS
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % BLOCKS * BLOCK_N
    real = token < tokens
    channel = tl.arange(0, BLOCK_C)
    # a token that is never padding
    index, inside = neighbour(token, real, top, left, height, width, out_height, out_width, top, left, STRIDE)
    about = tl.sum(load_rows(x_pointer, index, inside, 0, CHANNELS, BLOCK_C).to(tl.float32), 1)
    about *= 1.0 / (BLOCK_C if BLOCK_C < CHANNELS else CHANNELS)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
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
        weights = load_weights(folded_pointer, first, tap, start, OUTPUTS, CHANNELS, KERNEL, BLOCK_N, BLOCK_C)
        out += dot(x.to(weights.dtype), tl.trans(weights), PRECISION)
    mean = total * (1.0 / FEATURES)
    rstd = tl.rsqrt(tl.maximum(squares * (1.0 / FEATURES) - mean * mean, 0.0) + eps)
    output = first + tl.arange(0, BLOCK_N)
    sums = tl.load(sums_pointer + output, mask=output < OUTPUTS, other=0.0)
    constants = tl.load(sums_pointer + OUTPUTS + output, mask=output < OUTPUTS, other=0.0)
    out = (out - mean[:, None] * sums[None, :]) * rstd[:, None] + constants[None, :]
    to = output_pointer + tl.cast(token, tl.int64)[:, None] * OUTPUTS + output[None, :]
    tl.store(to, out.to(output_pointer.dtype.element_ty), mask=real[:, None] & (output < OUTPUTS)[None, :])
    if first == 0:
        tl.store(mean_pointer + token, about + mean, mask=real)
        tl.store(rstd_pointer + token, rstd, mask=real)


# --------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=SIZES)
def patch_merge_row_sums_kernel(
    gradient_pointer,  # [tokens, OUTPUTS]
    output_pointer,  # [tokens, OUTPUTS]
    sums_pointer,  # [2, OUTPUTS]
    rows_pointer,  # [2, tokens]: means over features of g W' and of g W' x, x the normalised neighbourhood
    tokens,
    OUTPUTS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each program: BLOCK_M tokens. W' x is the output less its constants."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < tokens
    index = tl.cast(token, tl.int64)
    mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    along = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(0, OUTPUTS, BLOCK_N):
        channel = first + tl.arange(0, BLOCK_N)
        gradient = load_rows(gradient_pointer, index, real, first, OUTPUTS, BLOCK_N).to(tl.float32)
        value = load_rows(output_pointer, index, real, first, OUTPUTS, BLOCK_N).to(tl.float32)
        sums = tl.load(sums_pointer + channel, mask=channel < OUTPUTS, other=0.0)
        constants = tl.load(sums_pointer + OUTPUTS + channel, mask=channel < OUTPUTS, other=0.0)
        mean += tl.sum(gradient * sums[None, :], 1)
        along += tl.sum(gradient * (value - constants[None, :]), 1)
    tl.store(rows_pointer + token, mean * (1.0 / FEATURES), mask=real)
    tl.store(rows_pointer + tokens + token, along * (1.0 / FEATURES), mask=real)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_input_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]
    gradient_pointer,  # [B, Ho, Wo, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [2, B, Ho, Wo]
    to_x_pointer,  # [B, H, W, CHANNELS]
    tokens,  # of the output
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
    """Each program: BLOCK_C channels of BLOCK_M input tokens of one phase, those that the same positions of
    neighbourhoods fall on. With g the gradient of the output, of all of these neighbourhoods the sum of
    rstd (g W' - <g W'> - x <g W' x>)."""
    PHASES: tl.constexpr = STRIDE * STRIDE
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    start = tl.program_id(0) % BLOCKS * BLOCK_C
    phase = tl.program_id(0) // BLOCKS % PHASES
    place = tl.program_id(0) // (BLOCKS * PHASES) * BLOCK_M + tl.arange(0, BLOCK_M)
    down = tl.cdiv(height + top, STRIDE)  # places of one phase along each axis
    across = tl.cdiv(width + left, STRIDE)
    image = place // (down * across)
    place_row = place // across % down
    place_column = place % across
    row = place_row * STRIDE + phase // STRIDE - top
    column = place_column * STRIDE + phase % STRIDE - left
    real = (image * out_height * out_width < tokens) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = (tl.cast(image, tl.int64) * height + row) * width + column
    x = load_rows(x_pointer, index, real, start, CHANNELS, BLOCK_C).to(tl.float32)
    steps_down = (KERNEL - phase // STRIDE + STRIDE - 1) // STRIDE  # positions of a neighbourhood in this phase
    steps_across = (KERNEL - phase % STRIDE + STRIDE - 1) // STRIDE
    to_x = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for step in range(steps_down * steps_across):
        down_step = step // steps_across
        across_step = step % steps_across
        out_row = place_row - down_step
        out_column = place_column - across_step
        inside = real & (out_row >= 0) & (out_row < out_height) & (out_column >= 0) & (out_column < out_width)
        token = (image * out_height + out_row) * out_width + out_column
        mean = tl.load(statistics_pointer + token, mask=inside, other=0.0)
        rstd = tl.load(statistics_pointer + tokens + token, mask=inside, other=0.0)
        level = tl.load(rows_pointer + token, mask=inside, other=0.0)
        along = tl.load(rows_pointer + tokens + token, mask=inside, other=0.0)
        to_x -= rstd[:, None] * (level[:, None] + (x - mean[:, None]) * (rstd * along)[:, None])
        tap = (phase // STRIDE + down_step * STRIDE) * KERNEL + phase % STRIDE + across_step * STRIDE
        for part in range(PARTS):
            weights = load_weights(
                folded_pointer, part * BLOCK_N, tap, start, OUTPUTS, CHANNELS, KERNEL, BLOCK_N, BLOCK_C
            )
            gradient = load_rows(gradient_pointer, tl.cast(token, tl.int64), inside, part * BLOCK_N, OUTPUTS, BLOCK_N)
            scaled = (gradient.to(tl.float32) * rstd[:, None]).to(weights.dtype)
            to_x += dot(scaled, weights, PRECISION)
    channel = start + tl.arange(0, BLOCK_C)
    to = to_x_pointer + index[:, None] * CHANNELS + channel[None, :]
    tl.store(to, to_x.to(to_x_pointer.dtype.element_ty), mask=real[:, None] & (channel < CHANNELS)[None, :])


@triton.jit(do_not_specialize=SIZES)
def patch_merge_products_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    gradient_pointer,  # [B, Ho, Wo, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    parts_pointer,  # [pieces, OUTPUTS, KERNEL * KERNEL, CHANNELS]
    tokens,
    per_piece,
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
    """Each program: g^T x, x the normalised neighbourhoods, of `per_piece` tokens, BLOCK_N outputs and BLOCK_C
    features."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    start = tl.program_id(0) % BLOCKS * BLOCK_C
    tap = tl.program_id(0) // BLOCKS % TAPS
    first = tl.program_id(0) // (BLOCKS * TAPS) % GROUPS * BLOCK_N
    piece = tl.program_id(0) // (BLOCKS * TAPS * GROUPS)
    end = tl.minimum((piece + 1) * per_piece, tokens)
    product = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for begin in range(piece * per_piece, end, BLOCK_M):
        token = begin + tl.arange(0, BLOCK_M)
        real = token < end
        index, inside = neighbour(
            token, real, tap // KERNEL, tap % KERNEL, height, width, out_height, out_width, top, left, STRIDE
        )
        mean = tl.load(statistics_pointer + token, mask=real, other=0.0)
        rstd = tl.load(statistics_pointer + tokens + token, mask=real, other=0.0)
        x = load_rows(x_pointer, index, inside, start, CHANNELS, BLOCK_C).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None]
        gradient = load_rows(gradient_pointer, tl.cast(token, tl.int64), real, first, OUTPUTS, BLOCK_N)
        product += dot(tl.trans(gradient), x.to(gradient.dtype), PRECISION)
    output = first + tl.arange(0, BLOCK_N)
    channel = start + tl.arange(0, BLOCK_C)
    index = (tl.cast(piece, tl.int64) * OUTPUTS + output) * TAPS + tap
    mask = (output < OUTPUTS)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(parts_pointer + index[:, None] * CHANNELS + channel[None, :], product, mask=mask)


# --------------------------------------------------------------------------- launches


def _precision() -> str:
    """Of float32 products: three TF32 products have float32's accuracy; one, if torch's own matmul may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def channel_block(channels: int, bits: int) -> int:
    """Channels that are loaded together: up to 128 bytes, with as few lanes as possible beyond the last one."""
    sizes = [size for size in (64, 32, 16) if size * bits <= 1024]
    return min(sizes, key=lambda size: (triton.cdiv(channels, size) * size, -size))


def _sizes(x: torch.Tensor, kernel: int, stride: int, padding: list[int]) -> dict[str, int]:
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


def _tiles(name: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """Tile sizes and launch options."""
    channels, bits = x.shape[3], 8 * weight.element_size()
    chosen = choose(name, family_of(x.device), weight.shape[0], channels, bits)
    return {key: value for key, value in chosen.items() if not key.startswith("TAIL")} | {
        "BLOCK_C": channel_block(channels, bits)
    }


def _shape(x: torch.Tensor, weight: torch.Tensor, kernel: int, stride: int) -> dict[str, int]:
    return {"CHANNELS": x.shape[3], "OUTPUTS": weight.shape[0], "KERNEL": kernel, "STRIDE": stride}


def _fold(
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
    x, sizes = x.contiguous(), _sizes(x, kernel, stride, padding)
    shape = (x.shape[0], sizes["out_height"], sizes["out_width"])
    output = weight.new_empty(*shape, weight.shape[0])
    statistics = weight.new_empty(2, *shape, dtype=torch.float32)
    if output.numel() == 0:
        return output, statistics
    with torch.cuda.device_of(x):
        folded, sums = _fold(weight, kernel, norm_weight, norm_bias, bias, channels_last)
        tiles = _tiles("patch_merge", x, weight)
        blocks = triton.cdiv(sizes["tokens"], tiles["BLOCK_M"]) * triton.cdiv(weight.shape[0], tiles["BLOCK_N"])
        patch_merge_kernel[(blocks,)](
            x, folded, sums, output, statistics[0], statistics[1], **sizes, eps=eps,
            **_shape(x, weight, kernel, stride), PRECISION=_precision(), **tiles,
        )  # fmt: skip
    return output, statistics


def patch_merge_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    channels_last: bool,
    padding: list[int],
    to_input: bool,
    to_parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of x, gradient^T x (x the normalised neighbourhoods) [Cout, features] in the order of the weight's
    features and the sum of the gradient [Cout], these two in float32; empty unless asked for."""
    x, gradient = x.contiguous(), gradient.to(weight.dtype).contiguous()
    to_x, product = x.new_empty(0), x.new_empty(0)
    total = product
    with torch.cuda.device_of(x):
        if to_input:
            folded, sums = _fold(weight, kernel, norm_weight, norm_bias, bias, channels_last)
            to_x = _input_gradient(gradient, x, output.contiguous(), statistics, folded, sums, kernel, stride, padding)
        if to_parameters:
            product = _products(gradient, x, statistics, weight, kernel, stride, padding)
            axes = (0, 2, 1, 3) if channels_last else (0, 3, 1, 2)
            product = product.view(-1, kernel, kernel, x.shape[3]).permute(axes).reshape(weight.shape)
            total = gradient.flatten(0, 2).sum(0, dtype=torch.float32)
    return to_x, product, total


def _input_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor,
    folded: torch.Tensor,
    sums: torch.Tensor,
    kernel: int,
    stride: int,
    padding: list[int],
) -> torch.Tensor:
    """[B, H, W, C]."""
    to_x, rows, sizes = torch.empty_like(x), torch.empty_like(statistics), _sizes(x, kernel, stride, padding)
    outputs = folded.shape[0]
    patch_merge_row_sums_kernel[(triton.cdiv(sizes["tokens"], 32),)](
        gradient, output, sums, rows, sizes["tokens"], OUTPUTS=outputs, FEATURES=kernel**2 * x.shape[3], BLOCK_M=32,
        BLOCK_N=min(128, triton.next_power_of_2(outputs)), enable_fp_fusion=True,
    )  # fmt: skip
    tiles = _tiles("patch_merge_input", x, folded)
    places = x.shape[0] * triton.cdiv(x.shape[1] + padding[0], stride) * triton.cdiv(x.shape[2] + padding[2], stride)
    blocks = triton.cdiv(places, tiles["BLOCK_M"]) * stride**2 * triton.cdiv(x.shape[3], tiles["BLOCK_C"])
    patch_merge_input_kernel[(blocks,)](
        x, folded, gradient, statistics, rows, to_x, **sizes, **_shape(x, folded, kernel, stride),
        PRECISION=_precision(), **tiles,
    )  # fmt: skip
    return to_x


def _products(
    gradient: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    padding: list[int],
) -> torch.Tensor:
    """[Cout, K*K*C], features ordered (row, column, channel)."""
    sizes, tiles = _sizes(x, kernel, stride, padding), _tiles("patch_merge_products", x, weight)
    blocks = kernel**2 * triton.cdiv(x.shape[3], tiles["BLOCK_C"]) * triton.cdiv(weight.shape[0], tiles["BLOCK_N"])
    steps = triton.cdiv(sizes["tokens"], tiles["BLOCK_M"])
    per_piece = triton.cdiv(steps, max(1, min(PROGRAMS // blocks, steps // 4))) * tiles["BLOCK_M"]
    pieces = triton.cdiv(sizes["tokens"], per_piece)
    parts = x.new_empty(pieces, *weight.shape, dtype=torch.float32)
    patch_merge_products_kernel[(pieces * blocks,)](
        x, gradient, statistics, parts, per_piece=per_piece, **sizes, **_shape(x, weight, kernel, stride),
        PRECISION=_precision(), **tiles,
    )  # fmt: skip
    return parts.sum(0) if pieces > 1 else parts[0]
