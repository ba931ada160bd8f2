"""Triton kernel of patch embedding: an implicit matrix product whose pixels are gathered from the image, LayerNorm in
the registers that have the sums, channels last.

The backward pass: patch_embed_backward.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .launch import Launcher
from .tile_table import block, choose, family_of, once_per_shape

MAXIMUM_CHANNEL_BLOCK = 128  # of the weight's gradient
# integers whose value or divisibility must not compile another kernel
SIZES = (
    "tokens", "rows", "columns", "row_factor", "row_shift", "column_factor", "column_shift", "height", "width", "left",
    "top", "per_program",
)  # fmt: skip
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Shape(NamedTuple):
    """Constants that a kernel is compiled for."""

    in_channels: int
    kernel: int  # pixels along each side of a patch
    row: int  # the same, filled up to a power of two
    stride: int
    dilation: int
    channels: int
    PADDED: bool
    HAS_BIAS: bool
    HAS_NORM: bool
    HAS_NORM_BIAS: bool
    vector: int  # pixels in a row that are in or outside of the image together, from the first pixel of a patch
    offset: tl.dtype  # of pixels inside an image
    compute_dtype: tl.dtype  # of products
    precision: str  # of float32 products


class Images(NamedTuple):
    """Strides of pixels, and the grid of tokens that they become."""

    pointer: tl.tensor  # to [B, in_channels, height, width], of any strides
    batch_stride: tl.tensor
    channel_stride: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor
    height: tl.tensor
    width: tl.tensor
    left: tl.tensor  # zeros
    top: tl.tensor
    tokens: tl.tensor  # B * rows * columns
    rows: tl.tensor
    columns: tl.tensor
    row_factor: tl.tensor  # of `reciprocal`
    row_shift: tl.tensor
    column_factor: tl.tensor
    column_shift: tl.tensor


# --------------------------------------------------------------------------- shared by the kernels


@triton.jit
def locate(start, images, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """Of the token `start` and those that follow, [M]: pointers to the first pixels of their patches in the first
    channel, and the row and column of these pixels, which lie outside the image where there is padding."""
    token = start + tl.arange(0, BLOCK_M)
    row = divide(token, images.column_factor, images.column_shift)
    image = divide(row, images.row_factor, images.row_shift)
    y = (row - image * images.rows) * SHAPE.stride
    x = (token - row * images.columns) * SHAPE.stride
    if SHAPE.PADDED:
        y -= images.top
        x -= images.left
    x = tl.multiple_of(x, tl.constexpr(SHAPE.vector))
    offset = tl.cast(y, SHAPE.offset) * images.row_stride + tl.cast(x, SHAPE.offset) * images.column_stride
    return images.pointer + tl.cast(image, tl.int64) * images.batch_stride + offset, y, x


@triton.jit
def divide(number, factor, shift):
    """number [M] // divisor, of which `reciprocal` made the others."""
    return tl.cast(tl.umulhi(tl.cast(number, tl.uint32) * 2, tl.cast(factor, tl.uint32)) >> shift, tl.int32)


def reciprocal(divisor: int) -> tuple[int, int]:
    """factor and shift, number // divisor = number * factor >> (31 + shift) for any number below 2^31: a division by
    what the compiler does not know takes ten instructions and more (Granlund and Montgomery, Division by Invariant
    Integers using Multiplication, PLDI 1994)."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


@triton.jit
def load_pixels(images, first, y, x, real, part, BLOCK_K: tl.constexpr, SHAPE: tl.constexpr):
    """[SEGMENTS, M, BLOCK_K / SEGMENTS]: of the patches of `locate` pixels BLOCK_K * part and the following, ordered
    [in_channels, kernel, row]; 0 where there is none.

    A segment is a row of the patch, part of a row that is longer than BLOCK_K, or several that are shorter than eight
    pixels. Segments are the slowest axis: their offsets are then the same in all threads, neighbouring threads have
    neighbouring pixels and tokens, whose pixels are close to each other in the image.
    """
    LENGTH: tl.constexpr = min(max(SHAPE.row, 8), BLOCK_K)  # with less the compiler fails for Blackwell
    segment = part * (BLOCK_K // LENGTH) + tl.arange(0, BLOCK_K // LENGTH)[:, None, None]
    pixel = tl.arange(0, LENGTH)[None, None, :]
    if SHAPE.row < LENGTH:
        patch_row = segment * (LENGTH // SHAPE.row) + pixel // SHAPE.row  # [SEGMENTS, 1, LENGTH]
        column = pixel % SHAPE.row
    else:
        patch_row = segment // (SHAPE.row // LENGTH)
        column = segment % (SHAPE.row // LENGTH) * LENGTH + pixel
    down, right = patch_row % SHAPE.kernel * SHAPE.dilation, column * SHAPE.dilation
    offset = tl.cast(patch_row // SHAPE.kernel, SHAPE.offset) * tl.cast(images.channel_stride, SHAPE.offset)
    offset += tl.cast(down, SHAPE.offset) * tl.cast(images.row_stride, SHAPE.offset)
    offset = offset + tl.cast(right, SHAPE.offset) * tl.cast(images.column_stride, SHAPE.offset)
    mask = (patch_row < SHAPE.in_channels * SHAPE.kernel) & (column < SHAPE.kernel)
    if SHAPE.PADDED:  # as unsigned numbers, negative ones are greater than any size
        y = tl.where(real, y, images.height)
        mask = mask & (tl.cast(y[None, :, None] + down, tl.uint32) < tl.cast(images.height, tl.uint32))
        mask = mask & (tl.cast(x[None, :, None] + right, tl.uint32) < tl.cast(images.width, tl.uint32))
    else:
        mask = mask & real[None, :, None]
    mask = tl.max_constancy(mask, [1, 1, tl.constexpr(SHAPE.vector)])
    return tl.load(first[None, :, None] + offset, mask=mask, other=0.0)


@triton.jit
def weight_index(k, SHAPE: tl.constexpr):
    """Indices in [in_channels, kernel, kernel] of the pixels k [K] of a patch, and which of them are there."""
    index = k // SHAPE.row * SHAPE.kernel + k % SHAPE.row
    return index, (k // SHAPE.row < SHAPE.in_channels * SHAPE.kernel) & (k % SHAPE.row < SHAPE.kernel)


@triton.jit
def convolve(images, weight_pointer, bias_pointer, start, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
             BLOCK_K: tl.constexpr, SHAPE: tl.constexpr):  # fmt: skip
    """float32 [M, BLOCK_C] of the tokens from `start` on: convolution and bias, zeros behind the channels."""
    real = tl.arange(0, BLOCK_M) < images.tokens - start
    first, y, x = locate(start, images, BLOCK_M, SHAPE)
    channel = tl.arange(0, BLOCK_C)
    values = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for part in range((SHAPE.in_channels * SHAPE.kernel * SHAPE.row + BLOCK_K - 1) // BLOCK_K):
        pixels = load_pixels(images, first, y, x, real, part, BLOCK_K, SHAPE).to(SHAPE.compute_dtype)
        pixels = tl.reshape(tl.permute(pixels, (1, 0, 2)), [BLOCK_M, BLOCK_K])
        index, is_pixel = weight_index(part * BLOCK_K + tl.arange(0, BLOCK_K), SHAPE)
        weight = tl.load(
            weight_pointer + channel[None, :] * (SHAPE.in_channels * SHAPE.kernel * SHAPE.kernel) + index[:, None],
            mask=is_pixel[:, None] & (channel < SHAPE.channels)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_C]
        values += dot(pixels, weight.to(SHAPE.compute_dtype), tl.constexpr(SHAPE.precision))
    if SHAPE.HAS_BIAS:
        values += tl.load(bias_pointer + channel, mask=channel < SHAPE.channels, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def output_places(start, tokens, channel, BLOCK_M: tl.constexpr, SHAPE: tl.constexpr):
    """Offsets [M, C] in a tensor [tokens, channels] from the first channel of the token `start`, and what is there."""
    token = tl.arange(0, BLOCK_M)[:, None]
    return token * SHAPE.channels + channel[None, :], (token < tokens - start) & (channel < SHAPE.channels)[None, :]


@triton.jit
def standardise(values, channel, eps, SHAPE: tl.constexpr):
    """values [M, BLOCK_C] minus their mean over the channels, zeros behind them, and 1 / sqrt(variance + eps) [M]."""
    mean = tl.sum(values, 1) / SHAPE.channels
    centered = tl.where((channel < SHAPE.channels)[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / SHAPE.channels
    return centered, 1.0 / tl.sqrt(variance + eps)


# --------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def patch_embed_kernel(
    image_pointer,  # [B, in_channels, height, width], of any strides
    weight_pointer,  # [channels, in_channels, kernel, kernel]
    bias_pointer,  # [channels]; read only if SHAPE.HAS_BIAS
    norm_weight_pointer,  # [channels]; read only if SHAPE.HAS_NORM
    norm_bias_pointer,  # [channels]; read only if SHAPE.HAS_NORM and SHAPE.HAS_NORM_BIAS
    output_pointer,  # [B, rows, columns, channels]
    tokens, rows, columns, row_factor, row_shift, column_factor, column_shift, height, width, batch_stride,
    channel_stride, row_stride, column_stride, left, top, eps,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_M tokens with all their channels."""
    images = Images(
        image_pointer, batch_stride, channel_stride, row_stride, column_stride, height, width, left, top,
        tokens, rows, columns, row_factor, row_shift, column_factor, column_shift,
    )  # fmt: skip
    start = tl.program_id(0) * BLOCK_M
    channel = tl.arange(0, BLOCK_C)
    values = convolve(images, weight_pointer, bias_pointer, start, BLOCK_M, BLOCK_C, BLOCK_K, SHAPE)
    if SHAPE.HAS_NORM:
        centered, scale = standardise(values, channel, eps, SHAPE)
        weight = tl.load(norm_weight_pointer + channel, mask=channel < SHAPE.channels, other=0.0).to(tl.float32)
        values = centered * scale[:, None] * weight[None, :]
        if SHAPE.HAS_NORM_BIAS:
            bias = tl.load(norm_bias_pointer + channel, mask=channel < SHAPE.channels, other=0.0)
            values += bias.to(tl.float32)[None, :]
    place, mask = output_places(start, tokens, channel, BLOCK_M, SHAPE)
    tl.store(output_pointer + tl.cast(start, tl.int64) * SHAPE.channels + place, values, mask=mask)


# --------------------------------------------------------------------------- decided once for a shape


class Problem(NamedTuple):
    """Everything that decides how an embedding is launched."""

    image_size: tuple[int, ...]  # [B, in_channels, H, W]
    image_strides: tuple[int, ...]
    weight_size: tuple[int, ...]  # [C, in_channels, K, K]
    stride: int
    dilation: int
    padding: tuple[int, ...]  # zeros at left, right, top and bottom
    compute_dtype: torch.dtype
    device: torch.device
    has_bias: bool
    has_norm: bool
    has_norm_bias: bool
    precision: str

    @property
    def output_size(self) -> tuple[int, int, int, int]:
        """[B, rows, columns, C]"""
        batch, _, height, width = self.image_size
        left, right, top, bottom = self.padding
        span = self.dilation * (self.weight_size[2] - 1) + 1
        rows = (height + top + bottom - span) // self.stride + 1
        return batch, rows, (width + left + right - span) // self.stride + 1, self.weight_size[0]

    @property
    def pixels(self) -> int:
        """The pixels of a patch that kernels walk through."""
        return pixel_count(*self.weight_size[1:3])

    @property
    def vector(self) -> int:
        """Pixels that can be loaded at once if their addresses allow it: nothing that begins or ends a row of a patch
        or of the image cuts them."""
        if self.dilation > 1 or self.image_strides[3] != 1:
            return 1
        kernel, width, left = self.weight_size[2], self.image_size[3], self.padding[0]
        common = math.gcd(kernel, self.stride, left, width if any(self.padding) else 0, 8)
        return common & -common

    @property
    def extent(self) -> int:
        """Elements of memory from the first to the last of an image."""
        pairs = zip(self.image_size[1:], self.image_strides[1:], strict=True)
        return 1 + sum((size - 1) * stride for size, stride in pairs)

    def arguments(self) -> dict[str, Any]:
        """Arguments of all kernels besides tensors, by name."""
        batch, rows, columns, channels = self.output_size
        row_factor, row_shift = reciprocal(max(rows, 1))  # without any, nothing is launched
        column_factor, column_shift = reciprocal(max(columns, 1))
        names = ("batch_stride", "channel_stride", "row_stride", "column_stride", "height", "width")
        kernel = self.weight_size[2]
        shape = Shape(
            self.image_size[1], kernel, triton.next_power_of_2(kernel), self.stride, self.dilation, channels,
            any(self.padding), self.has_bias, self.has_norm, self.has_norm_bias, self.vector,
            tl.int32 if self.extent < 2**31 else tl.int64, TRITON_TYPES[self.compute_dtype], self.precision,
        )  # fmt: skip
        return dict(zip(names, (*self.image_strides, *self.image_size[2:]), strict=True)) | {
            "left": self.padding[0],
            "top": self.padding[2],
            "tokens": batch * rows * columns,
            "rows": rows,
            "columns": columns,
            "row_factor": row_factor,
            "row_shift": row_shift,
            "column_factor": column_factor,
            "column_shift": column_shift,
            "SHAPE": shape,
        }

    def tiles(self, kernel: str) -> dict[str, Any]:
        """BLOCK_M tokens, BLOCK_K pixels of a patch, BLOCK_C channels and Triton's options."""
        block_c, bits = channel_block(kernel, self.weight_size[0]), 8 * self.compute_dtype.itemsize
        options = choose(kernel, family_of(self.device), bits=bits, pixels=self.pixels, block_d=block_c)
        return options | {"BLOCK_C": block_c, "BLOCK_K": min(options["BLOCK_K"], block(self.pixels))}


def channel_block(kernel: str, channels: int) -> int:
    """BLOCK_C of a kernel: all channels, where they are normalised."""
    return min(block(channels), MAXIMUM_CHANNEL_BLOCK) if kernel == "patch_embed_weight_gradient" else block(channels)


def pixel_count(in_channels: int, kernel: int) -> int:
    """Pixels of a patch in all channels, its rows filled up to a power of two: what kernels walk through."""
    return in_channels * kernel * triton.next_power_of_2(kernel)


@once_per_shape
def _launcher(problem: Problem) -> tuple[tuple[int, int, int, int], Launcher]:
    """The output's size, and its launcher."""
    arguments = problem.arguments() | problem.tiles("patch_embed")
    grid = (triton.cdiv(arguments["tokens"], arguments["BLOCK_M"]),)
    return problem.output_size, Launcher(patch_embed_kernel, grid, arguments)


def patch_embed(
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
    dtype: torch.dtype,
) -> torch.Tensor:
    """Patch embedding on a GPU: image [B, Cin, H, W] of any layout -> [B, Ho, Wo, C] of type `dtype`.

    Pixels and weights are rounded to `compute_dtype` (float32, float16 or bfloat16), sums are float32.
    """
    problem = Problem(
        image.shape, image.stride(), weight.shape, stride, dilation, (*padding,), compute_dtype, image.device,
        bias is not None, norm_weight is not None, norm_bias is not None, precision(compute_dtype, "conv"),
    )  # fmt: skip
    size, start = _launcher(problem)
    output = image.new_empty(size, dtype=dtype)
    if output.numel() == 0:
        return output
    start(  # any tensor stands for one that is not read
        image,
        weight.contiguous(),
        image if bias is None else bias.contiguous(),
        image if norm_weight is None else norm_weight.contiguous(),
        image if norm_bias is None else norm_bias.contiguous(),
        output,
        eps=float(eps),
    )
    return output
