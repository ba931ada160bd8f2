"""Triton kernels of the gradients of patch merging's parameters, from g^T x, g the gradient of the output and x
normalised neighbourhoods. It comes in pieces, which one kernel adds in a fixed order and makes all four gradients of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot
from .launch import PROGRAMS, Launcher
from .patch_merge import Problem, given_order
from .patch_merge_tiles import SIZES, Sizes, load_neighbourhoods, load_rows, load_statistics, place
from .tile_table import once_per_shape

FINISH_FEATURES, FINISH_OUTPUTS = 16, 32  # of a program of the last kernel


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
    must be within the range of float16, of which rstd may take 6 bits."""
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    smallest = tl.full([BLOCK], 1.0, dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        mean, rstd = load_statistics(statistics_pointer, token, token < end, sizes)
        squares += mean * rstd * mean * rstd
        largest = tl.maximum(largest, rstd)
        smallest = tl.minimum(smallest, tl.where(token < end, rstd, 1.0))
    within = tl.sum(squares, 0) <= tl.cast(end - begin, tl.float32)
    if HALF:
        within = within & (tl.max(largest, 0) <= 64.0) & (tl.min(smallest, 0) >= 1.0 / 64.0)
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
    """Launchers, and into how many pieces the tokens are cut."""

    products: Launcher
    pieces: int
    finish: Launcher


@once_per_shape
def _plan(problem: Problem) -> _Plan:
    arguments, outputs, features = problem.arguments(), problem.outputs, problem.features
    tiles = problem.tiles("patch_merge_products")
    blocks = triton.cdiv(features, tiles["BLOCK_K"]) * triton.cdiv(outputs, tiles["BLOCK_N"])
    steps = triton.cdiv(arguments["tokens"], tiles["BLOCK_M"])
    per_piece = triton.cdiv(steps, max(1, min(PROGRAMS // blocks, steps // 4))) * tiles["BLOCK_M"]
    pieces = triton.cdiv(arguments["tokens"], per_piece)
    arguments |= tiles | {"per_piece": per_piece}
    products = Launcher(patch_merge_products_kernel, (pieces * blocks,), arguments)
    arguments = problem.order() | {"BLOCK_N": FINISH_OUTPUTS, "BLOCK_K": FINISH_FEATURES, "pieces": pieces}
    grid = (triton.cdiv(features, FINISH_FEATURES),)
    return _Plan(products, pieces, Launcher(patch_merge_finish_kernel, grid, arguments | {"enable_fp_fusion": True}))


def parameter_gradients(
    problem: Problem,
    grad_output: torch.Tensor,
    scaled: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of weight, norm_weight, norm_bias and bias in their types, from the gradient of the output and the same
    times 1 / standard deviation."""
    plan = _plan(problem)
    products = statistics.new_empty((plan.pieces, *weight.shape))
    vectors = statistics.new_empty((plan.pieces, 2, weight.shape[0]))
    plan.products(x, grad_output, scaled, statistics, products, vectors)
    grads = [
        None if old is None else torch.empty_like(old, memory_format=torch.contiguous_format)
        for old in (weight, norm_weight, norm_bias, bias)
    ]
    plan.finish(
        products,
        vectors,
        weight.contiguous(),
        norm_weight.contiguous(),
        norm_weight if norm_bias is None else norm_bias.contiguous(),
        *(products if new is None else new for new in grads),  # any tensor stands for one that is not written
    )
    return (*grads,)
