"""Triton kernels of the backward pass of patch embedding, which computes the convolution again: its operands are small
beside its values, which are therefore never stored. No float atomics: each program sums over its own tokens, in an
order that only shapes decide.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .launch import Launcher, grouped
from .patch_embed import SIZES, Images, Problem, convolve, load_pixels, locate, output_places, standardise, weight_index
from .tile_table import once_per_shape


@triton.jit
def sum_rows(values, ROWS: tl.constexpr):
    """[ROWS, C] of values [M, C]: sums over rows that are ROWS apart, which threads need not exchange."""
    return tl.sum(tl.reshape(values, [values.shape[0] // ROWS, ROWS, values.shape[1]]), 0)


@triton.jit(do_not_specialize=SIZES)
def patch_embed_norm_gradient_kernel(
    image_pointer,  # [B, in_channels, height, width], of any strides
    weight_pointer,  # [channels, in_channels, kernel, kernel]
    bias_pointer,  # [channels]; read only if SHAPE.HAS_BIAS
    norm_weight_pointer,  # [channels]
    grad_output_pointer,  # [B, rows, columns, channels]
    grad_conv_pointer,  # same shape: of the convolution's values
    grad_vectors_pointer,  # [programs, 3, channels]: of the bias, the norm's weight and bias
    tokens, rows, columns, row_factor, row_shift, column_factor, column_shift, height, width, batch_stride,
    channel_stride, row_stride, column_stride, left, top, eps,
    per_program,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: `per_program` blocks of BLOCK_M tokens, through LayerNorm, and their sums."""
    ROWS: tl.constexpr = 8  # of sums: the rows of a tensor core's output that different threads have
    images = Images(
        image_pointer, batch_stride, channel_stride, row_stride, column_stride, height, width, left, top,
        tokens, rows, columns, row_factor, row_shift, column_factor, column_shift,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(norm_weight_pointer + channel, mask=channel < SHAPE.channels, other=0.0).to(tl.float32)[None, :]
    grad_bias = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    grad_norm_weight = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    grad_norm_bias = tl.zeros([ROWS, BLOCK_C], dtype=tl.float32)
    for number in range(per_program):
        start = (tl.program_id(0) * per_program + number) * BLOCK_M
        values = convolve(images, weight_pointer, bias_pointer, start, BLOCK_M, BLOCK_C, BLOCK_K, SHAPE)
        centered, scale = standardise(values, channel, eps, SHAPE)
        place, mask = output_places(start, tokens, channel, BLOCK_M, SHAPE)
        behind = tl.cast(start, tl.int64) * SHAPE.channels
        grad_output = tl.load(grad_output_pointer + behind + place, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, centered * scale[:, None], 0.0)  # infinite behind the last token where eps is 0
        weighted = grad_output * weight
        mean = tl.sum(weighted, 1) / SHAPE.channels
        slope = tl.sum(weighted * normal, 1) / SHAPE.channels
        grad_conv = tl.where(mask, (weighted - mean[:, None] - normal * slope[:, None]) * scale[:, None], 0.0)
        tl.store(grad_conv_pointer + behind + place, grad_conv, mask=mask)
        grad_bias += sum_rows(grad_conv, ROWS)
        grad_norm_weight += sum_rows(grad_output * normal, ROWS)
        grad_norm_bias += sum_rows(grad_output, ROWS)
    place = grad_vectors_pointer + tl.cast(tl.program_id(0), tl.int64) * (3 * SHAPE.channels) + channel
    tl.store(place, tl.sum(grad_bias, 0), mask=channel < SHAPE.channels)
    tl.store(place + SHAPE.channels, tl.sum(grad_norm_weight, 0), mask=channel < SHAPE.channels)
    tl.store(place + 2 * SHAPE.channels, tl.sum(grad_norm_bias, 0), mask=channel < SHAPE.channels)


@triton.jit(do_not_specialize=SIZES)
def patch_embed_weight_gradient_kernel(
    image_pointer,  # [B, in_channels, height, width], of any strides
    grad_conv_pointer,  # [B, rows, columns, channels]
    grad_weight_pointer,  # [groups, in_channels, kernel, kernel, channels]
    tokens, rows, columns, row_factor, row_shift, column_factor, column_shift, height, width, batch_stride,
    channel_stride, row_stride, column_stride, left, top,
    per_program,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_K pixels of a patch and BLOCK_C channels, summed over `per_program` blocks of tokens."""
    PIXEL_BLOCKS: tl.constexpr = (SHAPE.in_channels * SHAPE.kernel * SHAPE.row + BLOCK_K - 1) // BLOCK_K
    CHANNEL_BLOCKS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    images = Images(
        image_pointer, batch_stride, channel_stride, row_stride, column_stride, height, width, left, top,
        tokens, rows, columns, row_factor, row_shift, column_factor, column_shift,
    )  # fmt: skip
    part = tl.program_id(0) % (PIXEL_BLOCKS * CHANNEL_BLOCKS)
    group = tl.program_id(0) // (PIXEL_BLOCKS * CHANNEL_BLOCKS)
    channel = part // PIXEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    start = group * per_program * BLOCK_M
    grad_conv_pointer += tl.cast(start, tl.int64) * SHAPE.channels
    grad_weight = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    for _ in range(per_program):
        real = tl.arange(0, BLOCK_M) < tokens - start
        first, y, x = locate(start, images, BLOCK_M, SHAPE)
        pixels = load_pixels(images, first, y, x, real, part % PIXEL_BLOCKS, BLOCK_K, SHAPE)
        pixels = tl.reshape(tl.permute(pixels.to(SHAPE.compute_dtype), (0, 2, 1)), [BLOCK_K, BLOCK_M])
        place, mask = output_places(start, tokens, channel, BLOCK_M, SHAPE)
        grad_conv = tl.load(grad_conv_pointer + place, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        grad_conv_pointer += BLOCK_M * SHAPE.channels
        grad_weight += dot(pixels, grad_conv.to(SHAPE.compute_dtype), tl.constexpr(SHAPE.precision))
        start += BLOCK_M
    index, is_pixel = weight_index(part % PIXEL_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K), SHAPE)
    place = tl.cast(group, tl.int64) * (SHAPE.in_channels * SHAPE.kernel * SHAPE.kernel * SHAPE.channels)
    place = place + index[:, None] * SHAPE.channels + channel[None, :]
    tl.store(grad_weight_pointer + place, grad_weight, mask=is_pixel[:, None] & (channel < SHAPE.channels)[None, :])


# --------------------------------------------------------------------------- launches


class _Plan(NamedTuple):
    """Launchers, and the shapes of the sums over some tokens that they write."""

    norm: Launcher
    vectors: tuple[int, int, int]  # [programs, 3, C]
    weight: Launcher
    weights: tuple[int, int, int]  # [groups, Cin * K * K, C]


@once_per_shape
def _plan(problem: Problem) -> _Plan:
    arguments, channels = problem.arguments(), problem.weight_size[0]
    tiles = problem.tiles("patch_embed_norm_gradient")
    per_program, programs = grouped(triton.cdiv(arguments["tokens"], tiles["BLOCK_M"]))
    norm = Launcher(patch_embed_norm_gradient_kernel, (programs,), arguments | tiles | {"per_program": per_program})
    tiles = problem.tiles("patch_embed_weight_gradient")
    parts = triton.cdiv(problem.pixels, tiles["BLOCK_K"]) * triton.cdiv(channels, tiles["BLOCK_C"])
    per_program, groups = grouped(triton.cdiv(arguments["tokens"], tiles["BLOCK_M"]), parts)
    arguments |= tiles | {"per_program": per_program}
    weight = Launcher(patch_embed_weight_gradient_kernel, (groups * parts,), arguments)
    patch = problem.weight_size[1] * problem.weight_size[2] ** 2
    return _Plan(norm, (programs, 3, channels), weight, (groups, patch, channels))


def patch_embed_backward(
    grad_output: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    stride: int,
    dilation: int,
    padding: list[int],
    eps: float,
    compute_dtype: torch.dtype,
    needs_parameter_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the convolution's values [B, Ho, Wo, C], the weight, the bias, the norm's weight and bias; None for
    those that nobody needs."""
    problem = Problem(
        image.shape, image.stride(), weight.shape, stride, dilation, (*padding,), compute_dtype, image.device,
        bias is not None, norm_weight is not None, norm_bias is not None, precision(compute_dtype, "conv"),
    )  # fmt: skip
    plan = _plan(problem)
    grad_conv = grad_output = grad_output.contiguous()
    if norm_weight is not None:
        grad_conv = torch.empty_like(grad_output, dtype=compute_dtype)
        sums = image.new_empty(plan.vectors, dtype=torch.float32)
        plan.norm(
            image, weight.contiguous(), image if bias is None else bias.contiguous(), norm_weight.contiguous(),
            grad_output, grad_conv, sums, eps=float(eps),
        )  # fmt: skip
    if not needs_parameter_grads:
        return grad_conv, None, None, None, None
    weight_sums = image.new_empty(plan.weights, dtype=torch.float32)
    plan.weight(image, grad_conv, weight_sums)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_weight.flatten(1).t().copy_(weight_sums.sum(0))
    # of bias, norm_weight and norm_bias, [C] each
    vectors = (grad_output.sum((0, 1, 2), dtype=torch.float32), None, None) if norm_weight is None else sums.sum(0)
    grad_bias, grad_norm_weight, grad_norm_bias = (
        None if x is None else row.to(x.dtype, copy=True)
        for x, row in zip((bias, norm_weight, norm_bias), vectors, strict=True)
    )
    return grad_conv, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias
