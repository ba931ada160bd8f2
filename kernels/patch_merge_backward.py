"""Triton kernels of the backward pass of patch merging, which finds neighbourhoods again from the map and their
statistics.

Each token of the map gathers from the neighbourhoods that hold it; g^T x, g the gradient of the output and x the
normalised neighbourhoods, comes in pieces, which are added in a fixed order. No float atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .launch import PROGRAMS, Launch, device_guard
from .patch_merge import (
    SIZES,
    Problem,
    Sizes,
    fold_weights,
    load_rows,
    load_statistics,
    load_weights,
    neighbour,
    normalised_product,
)
from .tile_table import once_per_shape


@triton.jit(do_not_specialize=SIZES)
def patch_merge_row_sums_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, TAPS, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    sums_pointer,  # [2, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [blocks of outputs, 2, B, Ho, Wo]: means over features of g W' and of g W' x, x normalised
    tokens, height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N outputs of BLOCK_M tokens. W' x is computed again: the output is rounded, and what it has
    for x = 0 may be far larger."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    BLOCKS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) % BLOCKS
    real = token < tokens
    mean, rstd = load_statistics(statistics_pointer, token, real, sizes)
    value = normalised_product(
        x_pointer, folded_pointer, token, real, mean, rstd, block * BLOCK_N,
        sizes, BLOCK_M, BLOCK_N, BLOCK_C, SHAPE,
    )  # fmt: skip
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.cast(token, tl.int64)
    grad_output = load_rows(grad_output_pointer, index, real, block * BLOCK_N, SHAPE.outputs, BLOCK_N).to(tl.float32)
    sums = tl.load(sums_pointer + output, mask=output < SHAPE.outputs, other=0.0)
    to = rows_pointer + tl.cast(block, tl.int64) * 2 * tokens + token
    tl.store(to, tl.sum(grad_output * sums[None, :], 1) * (1.0 / FEATURES), mask=real)
    tl.store(to + tokens, tl.sum(grad_output * value, 1) * (1.0 / FEATURES), mask=real)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_input_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, TAPS, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [2, B, Ho, Wo]
    grad_x_pointer,  # [B, H, W, CHANNELS]
    tokens,  # of the output
    height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_C channels of BLOCK_M input tokens of one phase, those that the same positions of
    neighbourhoods fall on. With g the gradient of the output, of all of these neighbourhoods the sum of
    rstd (g W' - <g W'> - x <g W' x>)."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    PHASES: tl.constexpr = SHAPE.stride * SHAPE.stride
    BLOCKS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    start = tl.program_id(0) % BLOCKS * BLOCK_C
    phase = tl.program_id(0) // BLOCKS % PHASES
    place = tl.program_id(0) // (BLOCKS * PHASES) * BLOCK_M + tl.arange(0, BLOCK_M)
    down = tl.cdiv(height + top, SHAPE.stride)  # places of one phase along each axis
    across = tl.cdiv(width + left, SHAPE.stride)
    image = place // (down * across)
    place_row = place // across % down
    place_column = place % across
    row = place_row * SHAPE.stride + phase // SHAPE.stride - top
    column = place_column * SHAPE.stride + phase % SHAPE.stride - left
    real = (image * out_height * out_width < tokens) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = (tl.cast(image, tl.int64) * height + row) * width + column
    x = load_rows(x_pointer, index, real, start, SHAPE.channels, BLOCK_C).to(tl.float32)
    # positions of a neighbourhood in this phase
    steps_down = (SHAPE.kernel - phase // SHAPE.stride + SHAPE.stride - 1) // SHAPE.stride
    steps_across = (SHAPE.kernel - phase % SHAPE.stride + SHAPE.stride - 1) // SHAPE.stride
    grad_x = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for step in range(steps_down * steps_across):
        down_step = step // steps_across
        across_step = step % steps_across
        out_row = place_row - down_step
        out_column = place_column - across_step
        inside = real & (out_row >= 0) & (out_row < out_height) & (out_column >= 0) & (out_column < out_width)
        token = (image * out_height + out_row) * out_width + out_column
        mean, rstd = load_statistics(statistics_pointer, token, inside, sizes)
        level, along = load_statistics(rows_pointer, token, inside, sizes)
        grad_x -= rstd[:, None] * (level[:, None] + (x - mean[:, None]) * (rstd * along)[:, None])
        tap_row = phase // SHAPE.stride + down_step * SHAPE.stride
        tap = tap_row * SHAPE.kernel + phase % SHAPE.stride + across_step * SHAPE.stride
        for part in range(PARTS):
            weights = load_weights(folded_pointer, part * BLOCK_N, tap, start, BLOCK_N, BLOCK_C, SHAPE)
            grad_output = load_rows(
                grad_output_pointer, tl.cast(token, tl.int64), inside, part * BLOCK_N, SHAPE.outputs, BLOCK_N
            )
            scaled = (grad_output.to(tl.float32) * rstd[:, None]).to(weights.dtype)
            grad_x += dot(scaled, weights, tl.constexpr(SHAPE.precision))
    channel = start + tl.arange(0, BLOCK_C)
    to = grad_x_pointer + index[:, None] * SHAPE.channels + channel[None, :]
    tl.store(to, grad_x.to(grad_x_pointer.dtype.element_ty), mask=real[:, None] & (channel < SHAPE.channels)[None, :])


@triton.jit(do_not_specialize=SIZES)
def patch_merge_products_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    parts_pointer,  # [pieces, OUTPUTS, TAPS, CHANNELS]
    tokens, per_piece, height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: g^T x, x the normalised neighbourhoods, of `per_piece` tokens, BLOCK_N outputs and BLOCK_C
    features."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    TAPS: tl.constexpr = SHAPE.kernel * SHAPE.kernel
    BLOCKS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    start = tl.program_id(0) % BLOCKS * BLOCK_C
    tap = tl.program_id(0) // BLOCKS % TAPS
    first = tl.program_id(0) // (BLOCKS * TAPS) % GROUPS * BLOCK_N
    piece = tl.program_id(0) // (BLOCKS * TAPS * GROUPS)
    end = tl.minimum((piece + 1) * per_piece, tokens)
    product = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for begin in range(piece * per_piece, end, BLOCK_M):
        token = begin + tl.arange(0, BLOCK_M)
        real = token < end
        index, inside = neighbour(token, real, tap // SHAPE.kernel, tap % SHAPE.kernel, sizes, SHAPE)
        mean, rstd = load_statistics(statistics_pointer, token, real, sizes)
        x = load_rows(x_pointer, index, inside, start, SHAPE.channels, BLOCK_C).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None]
        grad_output = load_rows(grad_output_pointer, tl.cast(token, tl.int64), real, first, SHAPE.outputs, BLOCK_N)
        product += dot(tl.trans(grad_output), x.to(grad_output.dtype), tl.constexpr(SHAPE.precision))
    output = first + tl.arange(0, BLOCK_N)
    channel = start + tl.arange(0, BLOCK_C)
    index = (tl.cast(piece, tl.int64) * SHAPE.outputs + output) * TAPS + tap
    mask = (output < SHAPE.outputs)[:, None] & (channel < SHAPE.channels)[None, :]
    tl.store(parts_pointer + index[:, None] * SHAPE.channels + channel[None, :], product, mask=mask)


# --------------------------------------------------------------------------- launches


class _Plan(NamedTuple):
    """Launches, and how many parts of their sums they write."""

    fold: Launch
    row_sums: Launch
    output_blocks: int
    input: Launch
    products: Launch
    pieces: int


@once_per_shape
def _plan(problem: Problem) -> _Plan:
    arguments, (batch, height, width, channels) = problem.arguments(), problem.size
    tokens, outputs, stride = arguments["tokens"], problem.outputs, problem.stride
    tiles = problem.tiles("patch_merge")
    output_blocks = triton.cdiv(outputs, tiles["BLOCK_N"])
    row_sums = (triton.cdiv(tokens, tiles["BLOCK_M"]) * output_blocks,), arguments | tiles
    tiles = problem.tiles("patch_merge_input")
    places = triton.cdiv(height + problem.padding[0], stride) * triton.cdiv(width + problem.padding[2], stride)
    blocks = triton.cdiv(batch * places, tiles["BLOCK_M"]) * stride**2 * triton.cdiv(channels, tiles["BLOCK_C"])
    to_input = (blocks,), arguments | tiles
    tiles = problem.tiles("patch_merge_products")
    blocks = problem.kernel**2 * triton.cdiv(channels, tiles["BLOCK_C"]) * triton.cdiv(outputs, tiles["BLOCK_N"])
    steps = triton.cdiv(tokens, tiles["BLOCK_M"])
    per_piece = triton.cdiv(steps, max(1, min(PROGRAMS // blocks, steps // 4))) * tiles["BLOCK_M"]
    pieces = triton.cdiv(tokens, per_piece)
    products = (pieces * blocks,), arguments | tiles | {"per_piece": per_piece}
    return _Plan(problem.fold(), row_sums, output_blocks, to_input, products, pieces)


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
    feature_order: str,
    padding: list[int],
    needs_input_grad: bool,
    needs_parameter_grads: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight, norm_weight, norm_bias and bias, the last four in float32; None unless asked for."""
    x, grad_output = x.contiguous(), grad_output.to(weight.dtype).contiguous()
    plan = _plan(Problem(
        x.shape, weight.shape[0], kernel, stride, (*padding,), x.dtype, weight.dtype, x.device, precision(weight.dtype)
    ))  # fmt: skip
    grad_x, parameters = None, (None,) * 4
    with device_guard(x):
        if needs_input_grad:
            folded, sums = fold_weights(plan.fold, weight, norm_weight, norm_bias, bias, feature_order)
            grad_x = _input_gradient(plan, grad_output, x, statistics, folded, sums)
        if needs_parameter_grads:
            grid, arguments = plan.products
            products = x.new_empty((plan.pieces, *weight.shape), dtype=torch.float32)
            patch_merge_products_kernel[grid](x, grad_output, statistics, products, **arguments)
            # [Cout, features], features ordered (row, column, channel)
            product = products.sum(0) if plan.pieces > 1 else products[0]
            axes = (0, 2, 1, 3) if feature_order == "timm" else (0, 3, 1, 2)
            product = product.view(-1, kernel, kernel, x.shape[3]).permute(axes).reshape(weight.shape)
            parameters = _parameter_gradients(product, grad_output, weight, norm_weight, norm_bias)
    return grad_x, *parameters


def _input_gradient(
    plan: _Plan,
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    folded: torch.Tensor,
    sums: torch.Tensor,
) -> torch.Tensor:
    """[B, H, W, C]."""
    grid, arguments = plan.row_sums
    parts = statistics.new_empty((plan.output_blocks, *statistics.shape))
    patch_merge_row_sums_kernel[grid](x, folded, grad_output, sums, statistics, parts, **arguments)
    rows = parts.sum(0) if plan.output_blocks > 1 else parts[0]  # [2, B, Ho, Wo]
    grad_x = torch.empty_like(x)
    grid, arguments = plan.input
    patch_merge_input_kernel[grid](x, folded, grad_output, statistics, rows, grad_x, **arguments)
    return grad_x


def _parameter_gradients(
    product: torch.Tensor,
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of weight, norm_weight, norm_bias and bias from g^T x [Cout, features], x the normalised
    neighbourhoods."""
    total = grad_output.flatten(0, 2).sum(0, dtype=torch.float32)  # [Cout]
    weight = weight.to(torch.float32)
    grad_weight = product * norm_weight
    if norm_bias is not None:
        grad_weight += total.outer(norm_bias.to(torch.float32))
    return grad_weight, (weight * product).sum(0), (weight * total[:, None]).sum(0), total
