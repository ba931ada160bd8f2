"""Triton kernels of the backward pass of patch merging, which finds neighbourhoods again from the map and their
statistics.

Each token of the map gathers from the neighbourhoods that hold it; g^T x, g the gradient of the output and x the
normalised neighbourhoods, comes in pieces, which are added in a fixed order. No float atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dot import dot
from .patch_merge import (
    SIZES,
    constant_arguments,
    fold_weights,
    load_rows,
    load_weights,
    map_arguments,
    neighbour,
    normalised_product,
    tile_arguments,
)

PROGRAMS = 1024  # that sums over all tokens are cut into: a few for every multiprocessor


@triton.jit(do_not_specialize=SIZES)
def patch_merge_row_sums_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    sums_pointer,  # [2, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [blocks of outputs, 2, B, Ho, Wo]: means over features of g W' and of g W' x, x normalised
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
    """Each program: BLOCK_N outputs of BLOCK_M tokens. W' x is computed again: the output is rounded, and what it has
    for x = 0 may be far larger."""
    FEATURES: tl.constexpr = KERNEL * KERNEL * CHANNELS
    BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % BLOCKS
    real = token < tokens
    mean = tl.load(statistics_pointer + token, mask=real, other=0.0)
    rstd = tl.load(statistics_pointer + tokens + token, mask=real, other=0.0)
    value = normalised_product(
        x_pointer, folded_pointer, token, real, mean, rstd, block * BLOCK_N,
        height, width, out_height, out_width, top, left,
        CHANNELS, OUTPUTS, KERNEL, STRIDE, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION,
    )  # fmt: skip
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.cast(token, tl.int64)
    grad_output = load_rows(grad_output_pointer, index, real, block * BLOCK_N, OUTPUTS, BLOCK_N).to(tl.float32)
    sums = tl.load(sums_pointer + output, mask=output < OUTPUTS, other=0.0)
    to = rows_pointer + tl.cast(block, tl.int64) * 2 * tokens + token
    tl.store(to, tl.sum(grad_output * sums[None, :], 1) * (1.0 / FEATURES), mask=real)
    tl.store(to + tokens, tl.sum(grad_output * value, 1) * (1.0 / FEATURES), mask=real)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_input_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, KERNEL * KERNEL, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [2, B, Ho, Wo]
    grad_x_pointer,  # [B, H, W, CHANNELS]
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
    grad_x = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
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
        grad_x -= rstd[:, None] * (level[:, None] + (x - mean[:, None]) * (rstd * along)[:, None])
        tap = (phase // STRIDE + down_step * STRIDE) * KERNEL + phase % STRIDE + across_step * STRIDE
        for part in range(PARTS):
            weights = load_weights(
                folded_pointer, part * BLOCK_N, tap, start, OUTPUTS, CHANNELS, KERNEL, BLOCK_N, BLOCK_C
            )
            grad_output = load_rows(
                grad_output_pointer, tl.cast(token, tl.int64), inside, part * BLOCK_N, OUTPUTS, BLOCK_N
            )
            scaled = (grad_output.to(tl.float32) * rstd[:, None]).to(weights.dtype)
            grad_x += dot(scaled, weights, PRECISION)
    channel = start + tl.arange(0, BLOCK_C)
    to = grad_x_pointer + index[:, None] * CHANNELS + channel[None, :]
    tl.store(to, grad_x.to(grad_x_pointer.dtype.element_ty), mask=real[:, None] & (channel < CHANNELS)[None, :])


@triton.jit(do_not_specialize=SIZES)
def patch_merge_products_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
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
        grad_output = load_rows(grad_output_pointer, tl.cast(token, tl.int64), real, first, OUTPUTS, BLOCK_N)
        product += dot(tl.trans(grad_output), x.to(grad_output.dtype), PRECISION)
    output = first + tl.arange(0, BLOCK_N)
    channel = start + tl.arange(0, BLOCK_C)
    index = (tl.cast(piece, tl.int64) * OUTPUTS + output) * TAPS + tap
    mask = (output < OUTPUTS)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(parts_pointer + index[:, None] * CHANNELS + channel[None, :], product, mask=mask)


# --------------------------------------------------------------------------- launches


def patch_merge_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    channels_last: bool,
    padding: list[int],
    needs_input_grad: bool,
    needs_parameter_grads: bool,
) -> list[torch.Tensor | None]:
    """Gradients of x, weight, norm_weight, norm_bias and bias, the last four in float32; None unless asked for."""
    x, grad_output = x.contiguous(), grad_output.to(weight.dtype).contiguous()
    found: list[torch.Tensor | None] = [None] * 5
    with torch.cuda.device_of(x):
        if needs_input_grad:
            folded, sums = fold_weights(weight, kernel, norm_weight, norm_bias, bias, channels_last)
            found[0] = _input_gradient(grad_output, x, statistics, folded, sums, kernel, stride, padding)
        if needs_parameter_grads:
            product = _products(grad_output, x, statistics, weight, kernel, stride, padding)
            axes = (0, 2, 1, 3) if channels_last else (0, 3, 1, 2)
            product = product.view(-1, kernel, kernel, x.shape[3]).permute(axes).reshape(weight.shape)
            total = grad_output.flatten(0, 2).sum(0, dtype=torch.float32)  # [Cout]
            wide = weight.to(torch.float32)
            found[2], found[3], found[4] = (wide * product).sum(0), (wide * total[:, None]).sum(0), total
            found[1] = product * norm_weight
            if norm_bias is not None:
                found[1] += total.outer(norm_bias.to(torch.float32))
    return found


def _input_gradient(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    folded: torch.Tensor,
    sums: torch.Tensor,
    kernel: int,
    stride: int,
    padding: list[int],
) -> torch.Tensor:
    """[B, H, W, C]."""
    grad_x, sizes = torch.empty_like(x), map_arguments(x, kernel, stride, padding)
    constants = constant_arguments(x, folded, kernel, stride)
    tiles = tile_arguments("patch_merge", x, folded)
    blocks = triton.cdiv(folded.shape[0], tiles["BLOCK_N"])
    parts = statistics.new_empty(blocks, *statistics.shape)
    patch_merge_row_sums_kernel[(triton.cdiv(sizes["tokens"], tiles["BLOCK_M"]) * blocks,)](
        x, folded, grad_output, sums, statistics, parts, **sizes, **constants, **tiles
    )
    rows = parts.sum(0) if blocks > 1 else parts[0]  # [2, B, Ho, Wo]
    tiles = tile_arguments("patch_merge_input", x, folded)
    places = x.shape[0] * triton.cdiv(x.shape[1] + padding[0], stride) * triton.cdiv(x.shape[2] + padding[2], stride)
    blocks = triton.cdiv(places, tiles["BLOCK_M"]) * stride**2 * triton.cdiv(x.shape[3], tiles["BLOCK_C"])
    patch_merge_input_kernel[(blocks,)](x, folded, grad_output, statistics, rows, grad_x, **sizes, **constants, **tiles)
    return grad_x


def _products(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    kernel: int,
    stride: int,
    padding: list[int],
) -> torch.Tensor:
    """[Cout, K*K*C], features ordered (row, column, channel)."""
    sizes, tiles = map_arguments(x, kernel, stride, padding), tile_arguments("patch_merge_products", x, weight)
    blocks = kernel**2 * triton.cdiv(x.shape[3], tiles["BLOCK_C"]) * triton.cdiv(weight.shape[0], tiles["BLOCK_N"])
    steps = triton.cdiv(sizes["tokens"], tiles["BLOCK_M"])
    per_piece = triton.cdiv(steps, max(1, min(PROGRAMS // blocks, steps // 4))) * tiles["BLOCK_M"]
    pieces = triton.cdiv(sizes["tokens"], per_piece)
    parts = x.new_empty(pieces, *weight.shape, dtype=torch.float32)
    patch_merge_products_kernel[(pieces * blocks,)](
        x, grad_output, statistics, parts, per_piece=per_piece, **sizes, **constant_arguments(x, weight, kernel, stride),
        **tiles,
    )  # fmt: skip
    return parts.sum(0) if pieces > 1 else parts[0]
