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

from .dot import dot, precision
from .launch import PROGRAMS, Launch, device_guard
from .patch_merge import (
    SIZES,
    Places,
    Problem,
    Sizes,
    across,
    given_order,
    load_neighbourhoods,
    load_rows,
    load_statistics,
    load_sums,
    locate,
    normalised_product,
    on_map,
    place,
    prepare,
)
from .tile_table import block, once_per_shape

# of the kernel that finishes the gradients of parameters
FINISH_FEATURES, FINISH_OUTPUTS = 16, 32


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
    grad_output = load_rows(grad_output_pointer, token, real, output, SHAPE.outputs).to(tl.float32)
    to = scaled_pointer + (tl.cast(token, tl.int64) * SHAPE.outputs)[:, None] + output[None, :]
    scaled = (grad_output * rstd[:, None]).to(scaled_pointer.dtype.element_ty)
    tl.store(to, scaled, mask=real[:, None] & (output < SHAPE.outputs)[None, :])
    if HAS_ROWS:
        value = normalised_product(
            x_pointer, folded_pointer, sums_pointer, locate(token, real, sizes, SHAPE), mean, rstd, output,
            sizes, BLOCK_K, SHAPE,
        )  # fmt: skip
        # read again: registers are short while there are products
        grad_output = load_rows(grad_output_pointer, token, real, output, SHAPE.outputs).to(tl.float32)
        to = rows_pointer + tl.cast(part, tl.int64) * tokens + token
        tl.store(to, tl.sum(grad_output * value, 1) * (1.0 / FEATURES), mask=real)


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


# --------------------------------------------------------------------------- parameters


@triton.jit
def sum_tokens(
    x_pointer, gradient_pointer, statistics_pointer, begin, end, output, feature, sizes,
    BLOCK_M: tl.constexpr, RAW: tl.constexpr, STAGES: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """[N, K], float32: gradients of outputs [N] times features [K] of neighbourhoods, as they are if RAW, else
    normalised, summed over tokens."""
    product = tl.zeros([output.shape[0], feature.shape[0]], dtype=tl.float32)
    token = begin + tl.arange(0, BLOCK_M)
    image = token // (sizes.out_width * sizes.out_height)
    row = token // sizes.out_width % sizes.out_height
    column = token % sizes.out_width
    # of a step of BLOCK_M tokens: so no round divides
    images = BLOCK_M // (sizes.out_width * sizes.out_height)
    rows = BLOCK_M // sizes.out_width % sizes.out_height
    columns = BLOCK_M % sizes.out_width
    for first in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        token = first + tl.arange(0, BLOCK_M)
        real = token < end
        x = load_neighbourhoods(x_pointer, place(image, row, column, real, sizes, SHAPE), feature, sizes, SHAPE)
        column += columns
        row += rows + (column >= sizes.out_width)
        column = tl.where(column >= sizes.out_width, column - sizes.out_width, column)
        image += images + (row >= sizes.out_height)
        row = tl.where(row >= sizes.out_height, row - sizes.out_height, row)
        gradient = load_rows(gradient_pointer, token, real, output, SHAPE.outputs)
        if not RAW:
            mean, rstd = load_statistics(statistics_pointer, token, real, sizes)
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        product += dot(tl.trans(gradient), x.to(gradient.dtype), tl.constexpr(SHAPE.precision))
    return product


@triton.jit
def may_be_raw(statistics_pointer, begin, end, sizes, HALF: tl.constexpr, BLOCK: tl.constexpr = 512):
    """Whether the product over these tokens is exact enough if x carries its mean: where that is at most of the size of
    what is left without it, as sums that are rounded towards 0 lose a part of what they carry with every step. rstd g
    must be within the range of float16, of which 6 bits are left to rstd."""
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    extreme = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mean, rstd = load_statistics(statistics_pointer, token, token < end, sizes)
        squares += mean * rstd * mean * rstd
        extreme = tl.maximum(extreme, tl.where(token < end, tl.abs(tl.log2(rstd)), 0.0))
    within = tl.sum(squares, 0) <= tl.cast(end - begin, tl.float32)
    if HALF:
        within = within & (tl.max(extreme, 0) <= 6.0)
    return within


@triton.jit
def sum_vectors(
    grad_output_pointer, scaled_pointer, statistics_pointer, begin, end, output, sizes, SHAPE: tl.constexpr,
    BLOCK: tl.constexpr = 32,
):  # fmt: skip
    """[N] each: gradients of outputs [N], and rstd g times the mean of neighbourhoods, summed over tokens."""
    total = tl.zeros([output.shape[0]], dtype=tl.float32)
    along_mean = tl.zeros_like(total)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        real = token < end
        total += tl.sum(load_rows(grad_output_pointer, token, real, output, SHAPE.outputs).to(tl.float32), 0)
        if SHAPE.RAW:
            mean, _ = load_statistics(statistics_pointer, token, real, sizes)
            scaled = load_rows(scaled_pointer, token, real, output, SHAPE.outputs).to(tl.float32)
            along_mean += tl.sum(scaled * mean[:, None], 0)
    return total, along_mean


@triton.jit(do_not_specialize=SIZES)
def patch_merge_products_kernel(
    x_pointer,  # [B, H, W, CHANNELS]
    grad_output_pointer,  # [B, Ho, Wo, OUTPUTS]: g
    scaled_pointer,  # [B, Ho, Wo, OUTPUTS]: rstd g
    statistics_pointer,  # [2, B, Ho, Wo]
    parts_pointer,  # [pieces, OUTPUTS, features]: rstd g^T x, or g^T x if x had to be normalised
    vectors_pointer,  # [pieces, 2, OUTPUTS]: sums of g; of rstd g mean, which parts have too much
    tokens, per_piece, height, width, out_height, out_width, top, left,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program: `per_piece` tokens, BLOCK_N outputs and BLOCK_K features; of the first features, vectors, too."""
    sizes = Sizes(tokens, height, width, out_height, out_width, top, left)
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    BLOCKS: tl.constexpr = (FEATURES + BLOCK_K - 1) // BLOCK_K
    GROUPS: tl.constexpr = (SHAPE.outputs + BLOCK_N - 1) // BLOCK_N
    start = tl.program_id(0) % BLOCKS * BLOCK_K
    feature = start + tl.arange(0, BLOCK_K)
    output = tl.program_id(0) // BLOCKS % GROUPS * BLOCK_N + tl.arange(0, BLOCK_N)
    piece = tl.program_id(0) // (BLOCKS * GROUPS)
    begin = piece * per_piece
    end = tl.minimum(begin + per_piece, tokens)
    raw = False
    if SHAPE.RAW:
        raw = may_be_raw(statistics_pointer, begin, end, sizes, scaled_pointer.dtype.element_ty == tl.float16)
        if raw:
            product = sum_tokens(
                x_pointer, scaled_pointer, statistics_pointer, begin, end, output, feature, sizes,
                BLOCK_M, True, None, SHAPE,
            )  # fmt: skip
        else:
            product = sum_tokens(
                x_pointer, grad_output_pointer, statistics_pointer, begin, end, output, feature, sizes,
                BLOCK_M, False, 1, SHAPE,
            )  # fmt: skip
    else:
        product = sum_tokens(
            x_pointer, grad_output_pointer, statistics_pointer, begin, end, output, feature, sizes,
            BLOCK_M, False, None, SHAPE,
        )  # fmt: skip
    if start == 0:
        total, along_mean = sum_vectors(
            grad_output_pointer, scaled_pointer, statistics_pointer, begin, end, output, sizes, SHAPE
        )  # fmt: skip
        to = vectors_pointer + tl.cast(piece, tl.int64) * (2 * SHAPE.outputs) + output
        tl.store(to, total, mask=output < SHAPE.outputs)
        tl.store(to + SHAPE.outputs, tl.where(raw, along_mean, 0.0), mask=output < SHAPE.outputs)
    index = (tl.cast(piece, tl.int64) * SHAPE.outputs + output) * FEATURES
    mask = (output < SHAPE.outputs)[:, None] & (feature < FEATURES)[None, :]
    tl.store(parts_pointer + index[:, None] + feature[None, :], product, mask=mask)


@triton.jit(do_not_specialize=("pieces",))
def patch_merge_finish_kernel(
    parts_pointer,  # [pieces, OUTPUTS, features]
    vectors_pointer,  # [pieces, 2, OUTPUTS]
    weight_pointer,  # [OUTPUTS, features], as given
    norm_weight_pointer,  # [features]
    norm_bias_pointer,  # [features]; read only if HAS_NORM_BIAS
    grad_weight_pointer, grad_norm_weight_pointer, grad_norm_bias_pointer, grad_bias_pointer,  # as given
    pieces,
    SHAPE: tl.constexpr, FEATURE_ORDER: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program: gradients of all parameters for BLOCK_K features; the first one that of the bias, too."""
    FEATURES: tl.constexpr = SHAPE.kernel * SHAPE.kernel * SHAPE.channels
    feature = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    given = given_order(feature, FEATURE_ORDER, SHAPE)
    norm_weight = tl.load(norm_weight_pointer + given, mask=feature < FEATURES, other=0.0).to(tl.float32)
    if HAS_NORM_BIAS:
        norm_bias = tl.load(norm_bias_pointer + given, mask=feature < FEATURES, other=0.0).to(tl.float32)
    grad_norm_weight = tl.zeros([BLOCK_K], dtype=tl.float32)
    grad_norm_bias = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, SHAPE.outputs, BLOCK_N):
        output = first + tl.arange(0, BLOCK_N)
        there = output < SHAPE.outputs
        mask = there[:, None] & (feature < FEATURES)[None, :]
        row = tl.cast(output, tl.int64) * FEATURES
        product = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        along_mean = tl.zeros([BLOCK_N], dtype=tl.float32)
        for piece in range(pieces):
            part = parts_pointer + tl.cast(piece, tl.int64) * (SHAPE.outputs * FEATURES)
            product += tl.load(part + row[:, None] + feature[None, :], mask=mask, other=0.0)
            vector = vectors_pointer + tl.cast(piece, tl.int64) * (2 * SHAPE.outputs) + output
            total += tl.load(vector, mask=there, other=0.0)
            along_mean += tl.load(vector + SHAPE.outputs, mask=there, other=0.0)
        product -= along_mean[:, None]
        weight = tl.load(weight_pointer + row[:, None] + given[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_norm_weight += tl.sum(weight * product, 0)
        grad_norm_bias += tl.sum(weight * total[:, None], 0)
        grad_weight = product * norm_weight[None, :]
        if HAS_NORM_BIAS:
            grad_weight += total[:, None] * norm_bias[None, :]
        to = grad_weight_pointer + row[:, None] + given[None, :]
        tl.store(to, grad_weight.to(grad_weight_pointer.dtype.element_ty), mask=mask)
        if HAS_BIAS and tl.program_id(0) == 0:
            tl.store(grad_bias_pointer + output, total.to(grad_bias_pointer.dtype.element_ty), mask=there)
    mask = feature < FEATURES
    element: tl.constexpr = grad_norm_weight_pointer.dtype.element_ty
    tl.store(grad_norm_weight_pointer + given, grad_norm_weight.to(element), mask=mask)
    if HAS_NORM_BIAS:
        to = grad_norm_bias_pointer + given
        tl.store(to, grad_norm_bias.to(grad_norm_bias_pointer.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------- launches


class _Plan(NamedTuple):
    """Launches, and how many parts of their sums they write."""

    prepare: Launch
    row_sums: Launch
    row_blocks: int
    input: Launch
    products: Launch
    pieces: int
    finish: Launch


def _channel_block(problem: Problem, widest: int) -> int:
    """Channels of the input's gradient that a program has: half of the widest tile where less of it is empty then, or
    where it would take more registers than there are: for x in float32, or for the addresses of rows that are not
    aligned to the 16 bytes of a load."""
    channels, wide = problem.size[3], problem.x_dtype.itemsize > 2
    if widest >= 128 and (triton.cdiv(channels, widest // 2) % 2 or wide or channels % 8):
        widest //= 2
    return min(widest, block(channels))


@once_per_shape
def _plan(problem: Problem) -> _Plan:
    arguments, (batch, height, width, channels) = problem.arguments(), problem.size
    tokens, outputs, stride, features = arguments["tokens"], problem.outputs, problem.stride, problem.features
    tiles = problem.tiles("patch_merge")
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], 128)  # registers hold the gradient beside the product
    row_blocks = triton.cdiv(outputs, tiles["BLOCK_N"])
    row_sums = (triton.cdiv(tokens, tiles["BLOCK_M"]) * row_blocks,), arguments | tiles
    tiles = problem.tiles("patch_merge_input")
    tiles["BLOCK_N"] = _channel_block(problem, tiles["BLOCK_N"])
    places = triton.cdiv(height + problem.padding[0], stride) * triton.cdiv(width + problem.padding[2], stride)
    blocks = triton.cdiv(batch * places, tiles["BLOCK_M"]) * stride**2 * triton.cdiv(channels, tiles["BLOCK_N"])
    neighbours = triton.next_power_of_2(triton.cdiv(problem.kernel, stride) ** 2)
    to_input = (blocks,), arguments | tiles | {"ROW_BLOCKS": row_blocks, "NEIGHBOURS": neighbours}
    tiles = problem.tiles("patch_merge_products")
    blocks = triton.cdiv(features, tiles["BLOCK_K"]) * triton.cdiv(outputs, tiles["BLOCK_N"])
    steps = triton.cdiv(tokens, tiles["BLOCK_M"])
    per_piece = triton.cdiv(steps, max(1, min(PROGRAMS // blocks, steps // 4))) * tiles["BLOCK_M"]
    pieces = triton.cdiv(tokens, per_piece)
    products = (pieces * blocks,), arguments | tiles | {"per_piece": per_piece}
    finish = {"SHAPE": problem.shape, "BLOCK_N": FINISH_OUTPUTS, "BLOCK_K": FINISH_FEATURES, "pieces": pieces}
    finish_launch = (triton.cdiv(features, FINISH_FEATURES),), finish | {"enable_fp_fusion": True}
    return _Plan(problem.prepare(False), row_sums, row_blocks, to_input, products, pieces, finish_launch)


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
    problem = Problem(
        x.shape, weight.shape[0], kernel, stride, (*padding,), x.dtype, weight.dtype, x.device, precision(weight.dtype)
    )
    plan, scaled, grad_x = _plan(problem), grad_output, None
    with device_guard(x):
        if needs_input_grad or problem.shape.RAW:
            folded = sums = rows = statistics
            if needs_input_grad:
                folded, sums = prepare(plan.prepare, x, x, weight, norm_weight, norm_bias, bias, feature_order)
                rows = statistics.new_empty((plan.row_blocks, *statistics.shape[1:]))
            scaled = torch.empty_like(grad_output)
            grid, arguments = plan.row_sums
            patch_merge_row_sums_kernel[grid](
                x, folded, grad_output, sums, statistics, rows, scaled, HAS_ROWS=needs_input_grad, **arguments
            )
        if needs_input_grad:
            grad_x = torch.empty_like(x)
            grid, arguments = plan.input
            patch_merge_input_kernel[grid](x, folded, scaled, sums, statistics, rows, grad_x, **arguments)
        if not needs_parameter_grads:
            return grad_x, None, None, None, None
        return grad_x, *_parameter_gradients(
            plan, grad_output, scaled, x, statistics, weight, norm_weight, norm_bias, bias, feature_order
        )


def _parameter_gradients(
    plan: _Plan,
    grad_output: torch.Tensor,
    scaled: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    feature_order: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of weight, norm_weight, norm_bias and bias."""
    products = statistics.new_empty((plan.pieces, *weight.shape))
    vectors = statistics.new_empty((plan.pieces, 2, weight.shape[0]))
    grid, arguments = plan.products
    patch_merge_products_kernel[grid](x, grad_output, scaled, statistics, products, vectors, **arguments)
    grads = [
        None if old is None else torch.empty_like(old, memory_format=torch.contiguous_format)
        for old in (weight, norm_weight, norm_bias, bias)
    ]
    grid, arguments = plan.finish
    patch_merge_finish_kernel[grid](
        products,
        vectors,
        weight.contiguous(),
        norm_weight.contiguous(),
        norm_weight if norm_bias is None else norm_bias.contiguous(),
        *(products if new is None else new for new in grads),  # any tensor stands for one that is not written
        FEATURE_ORDER=feature_order,
        HAS_NORM_BIAS=norm_bias is not None,
        HAS_BIAS=bias is not None,
        **arguments,
    )
    return *grads,
