"""Triton kernels of the backward pass of patch merging, which finds neighbourhoods again from the map and their
statistics.

With g the gradient of the output and W' folded weights, whose rows have mean 0, the gradient of a neighbourhood is
rstd (g W' - x <g W' x>), x normalised. Each token of the map gathers from the neighbourhoods that hold it; g^T x comes
in pieces, which are added in a fixed order. No float atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot
from .launch import Launcher
from .patch_merge import Problem, prepare, problem_of
from .patch_merge_parameters import parameter_gradients
from .patch_merge_tiles import (
    SIZES,
    Places,
    Sizes,
    across,
    load_rows,
    load_statistics,
    locate,
    normalised_product,
    on_map,
)
from .tile_table import block, once_per_shape


@triton.jit(do_not_specialize=SIZES)
def patch_merge_row_sums_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, features]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]
    sums_pointer,  # [3, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [blocks of outputs, B, Ho, Wo]: means over features of g W' x, x normalised
    scaled_pointer,  # [B, Ho, Wo, OUTPUTS]: rstd g
    tokens, height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N outputs of BLOCK_M tokens. W' x is computed again: the output is rounded, and what it has
    for x = 0 may be far larger."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    BLOCKS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) % BLOCKS
    output = part * BLOCK_N + tl.arange(0, BLOCK_N)
    real = token < tokens
    mean, rstd = load_statistics(statistics_pointer, token, real, sizes)
    if HAS_ROWS:
        value = normalised_product(
            x_pointer, folded_pointer, sums_pointer, locate(token, real, sizes, SHAPE), mean, rstd, output,
            sizes, BLOCK_K, SHAPE,
        )  # fmt: skip
    grad_output = load_rows(grad_output_pointer, token, real, output, SHAPE.outputs).to(tl.float32)
    if HAS_ROWS:
        to = rows_pointer + tl.cast(part, tl.int64) * tokens + token
        tl.store(to, tl.sum(grad_output * value, 1) * (1.0 / FEATURES), mask=real)
    to = scaled_pointer + (tl.cast(token, tl.int64) * SHAPE.outputs)[:, None] + output[None, :]
    scaled = (grad_output * rstd[:, None]).to(scaled_pointer.dtype.element_ty)
    tl.store(to, scaled, mask=real[:, None] & (output < SHAPE.outputs)[None, :])


@triton.jit
def gather_slopes(
    places, statistics_pointer, rows_pointer, phase_row, phase_column, sizes,
    BLOCKS: tl.constexpr, STEPS: tl.constexpr, NEIGHBOURS: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Of the neighbourhoods that hold tokens [T], with slopes s = rstd^2 <g W' x>: the mean of their means, the sum of
    s, and the sum of s times the distance from that mean to theirs."""
    neighbour = tl.arange(0, NEIGHBOURS)[None, :]
    down = neighbour // STEPS
    right = neighbour % STEPS
    inside = on_map(across(places), -down, -right, sizes.out_height, sizes.out_width) & (down < STEPS)
    inside = inside & (phase_row + down * SHAPE.stride < SHAPE.kernel)
    inside = inside & (phase_column + right * SHAPE.stride < SHAPE.kernel)
    token = places.index[:, None] - (tl.cast(sizes.out_width, tl.int64) * down + right)  # [T, NEIGHBOURS]
    mean, rstd = load_statistics(statistics_pointer, token, inside, sizes)
    slope = tl.zeros_like(rstd)
    for part in range(BLOCKS):
        slope += tl.load(rows_pointer + tl.cast(sizes.tokens, tl.int64) * part + token, mask=inside, other=0.0)
    slope *= rstd * rstd
    about = tl.sum(mean, 1) / tl.maximum(tl.sum(inside.to(tl.float32), 1), 1.0)
    return about, tl.sum(slope, 1), tl.sum(slope * (about[:, None] - mean), 1)


@triton.jit(do_not_specialize=SIZES)
def patch_merge_input_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    folded_pointer,  # [OUTPUTS, features]
    scaled_pointer,  # [B, Ho, Wo, OUTPUTS]: rstd g
    sums_pointer,  # [3, OUTPUTS]
    statistics_pointer,  # [2, B, Ho, Wo]
    rows_pointer,  # [ROW_BLOCKS, B, Ho, Wo]
    grad_x_pointer,  # [B, H, W, CHANNELS]
    tokens,  # of the output
    height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, ROW_BLOCKS: tl.constexpr, NEIGHBOURS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N channels of BLOCK_M input tokens of one phase, those that the same positions of
    neighbourhoods fall on."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    PHASES: tl.constexpr = SHAPE.stride * SHAPE.stride
    BLOCKS: tl.constexpr = (SHAPE.channels + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (SHAPE.kernel + SHAPE.stride - 1) // SHAPE.stride  # neighbourhoods along an axis, at most
    PARTS: tl.constexpr = (SHAPE.outputs + BLOCK_K - 1) // BLOCK_K
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    channel = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(0) // BLOCKS % PHASES
    phase_row = phase // SHAPE.stride
    phase_column = phase % SHAPE.stride
    number = tl.program_id(0) // (BLOCKS * PHASES) * BLOCK_M + tl.arange(0, BLOCK_M)
    place_rows = tl.cdiv(height + top, SHAPE.stride)  # of one phase
    place_columns = tl.cdiv(width + left, SHAPE.stride)
    image = tl.cast(number // (place_rows * place_columns), tl.int64)
    place_row = number // place_columns % place_rows
    place_column = number % place_columns
    row = place_row * SHAPE.stride + phase_row - top
    column = place_column * SHAPE.stride + phase_column - left
    real = (image * out_height * out_width < tokens) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = (image * height + row) * width + column
    # the last of the neighbourhoods that hold a token; the others are up to STEPS - 1 rows and columns before it
    places = Places(tl.where(real, place_row, out_height + STEPS), place_column,
                    (image * out_height + place_row) * out_width + place_column)  # fmt: skip
    about, total, moved = gather_slopes(
        places, statistics_pointer, rows_pointer, phase_row, phase_column, sizes, ROW_BLOCKS, STEPS, NEIGHBOURS, SHAPE
    )  # fmt: skip
    grad_x = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    steps_down = (SHAPE.kernel - phase_row + SHAPE.stride - 1) // SHAPE.stride
    if SHAPE.kernel % SHAPE.stride == 0:
        steps_down = STEPS
    for step in range(steps_down * STEPS * PARTS):
        down = step // (STEPS * PARTS)
        right = step // PARTS % STEPS
        output = step % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = on_map(places, -down, -right, out_height, out_width)
        token = places.index - (tl.cast(out_width, tl.int64) * down + right)
        scaled = load_rows(scaled_pointer, token, inside, output, SHAPE.outputs)
        tap_row = phase_row + down * SHAPE.stride
        tap_column = phase_column + right * SHAPE.stride
        held = output < SHAPE.outputs
        if SHAPE.kernel % SHAPE.stride != 0:
            held = held & (tap_row < SHAPE.kernel) & (tap_column < SHAPE.kernel)
        tap = folded_pointer + (tap_row * SHAPE.kernel + tap_column) * SHAPE.channels
        mask = held[:, None] & (channel < SHAPE.channels)[None, :]
        index_weights = tl.cast(output, tl.int64) * FEATURES
        weights = tl.load(tap + index_weights[:, None] + channel[None, :], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        grad_x += dot(scaled, weights, tl.constexpr(SHAPE.precision))
    x = load_rows(x_pointer, index, real, channel, SHAPE.channels).to(tl.float32)
    grad_x = grad_x * tl.load(sums_pointer + 2 * SHAPE.outputs)
    grad_x -= (x - about[:, None]) * total[:, None] + moved[:, None]
    to = grad_x_pointer + (index * SHAPE.channels)[:, None] + channel[None, :]
    tl.store(to, grad_x.to(grad_x_pointer.dtype.element_ty), mask=real[:, None] & (channel < SHAPE.channels)[None, :])


# --------------------------------------------------------------------------- launches


class _Plan(NamedTuple):
    """Launchers, and how many parts of their sums they write."""

    prepare: Launcher
    row_sums: Launcher
    row_blocks: int
    input: Launcher


@once_per_shape
def _plan(problem: Problem, needs_input_grad: bool) -> _Plan:
    arguments, (batch, height, width, channels) = problem.arguments(), problem.size
    tokens, outputs, stride = arguments["tokens"], problem.outputs, problem.stride
    tiles = problem.tiles("patch_merge")
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], 128)  # registers hold the gradient beside the product
    row_blocks = triton.cdiv(outputs, tiles["BLOCK_N"])
    blocks = triton.cdiv(tokens, tiles["BLOCK_M"]) * row_blocks
    row_sums = Launcher(patch_merge_row_sums_kernel, (blocks,), arguments | tiles | {"HAS_ROWS": needs_input_grad})
    tiles = problem.tiles("patch_merge_input")
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], block(channels))
    places = triton.cdiv(height + problem.padding[0], stride) * triton.cdiv(width + problem.padding[2], stride)
    blocks = triton.cdiv(batch * places, tiles["BLOCK_M"]) * stride**2 * triton.cdiv(channels, tiles["BLOCK_N"])
    neighbours = triton.next_power_of_2(triton.cdiv(problem.kernel, stride) ** 2)
    arguments |= tiles | {"ROW_BLOCKS": row_blocks, "NEIGHBOURS": neighbours}
    to_input = Launcher(patch_merge_input_kernel, (blocks,), arguments)
    return _Plan(problem.prepare(False), row_sums, row_blocks, to_input)


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
    """Gradients of x, weight, norm_weight, norm_bias and bias in their types; None unless asked for."""
    x, grad_output = x.contiguous(), grad_output.to(weight.dtype).contiguous()
    problem = problem_of(x, weight, kernel, stride, padding, norm_bias, bias, feature_order)
    plan, scaled, grad_x = _plan(problem, needs_input_grad), grad_output, None
    if needs_input_grad or problem.shape.RAW:
        folded = sums = rows = statistics
        if needs_input_grad:
            folded, sums = prepare(plan.prepare, x, x, weight, norm_weight, norm_bias, bias)
            rows = statistics.new_empty((plan.row_blocks, *statistics.shape[1:]))
        scaled = torch.empty_like(grad_output)
        plan.row_sums(x, folded, grad_output, sums, statistics, rows, scaled)
    if needs_input_grad:
        grad_x = torch.empty_like(x)
        plan.input(x, folded, scaled, sums, statistics, rows, grad_x)
    if not needs_parameter_grads:
        return grad_x, None, None, None, None
    return grad_x, *parameter_gradients(
        problem, grad_output, scaled, x, statistics, weight, norm_weight, norm_bias, bias
    )
