"""Triton kernels of patch embedding: implicit matrix products whose pixels are gathered from the image, LayerNorm in
the registers that have the sums, channels last.

The backward pass computes the convolution again: its operands are small beside its values, which are therefore never
stored. No float atomics: each program sums over its own tokens, in an order that only shapes decide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .dot import dot, precision
from .tile_table import block, choose, family_of

PROGRAMS = 1024  # that a sum over tokens is cut into: a few for every multiprocessor
MAXIMUM_CHANNEL_BLOCK = 128  # of the weight's gradient
# integers whose value or divisibility must not compile another kernel
SIZES = ("tokens", "rows", "columns", "height", "width", "left", "top", "per_program")
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# --------------------------------------------------------------------------- shared by the kernels


@triton.jit
def locate(token, rows, columns, batch_stride, STRIDE: tl.constexpr):
    """Of tokens [M]: where their images begin, and the row and column of their first pixels without padding."""
    image = token // (rows * columns)
    y = token // columns % rows * STRIDE
    x = token % columns * STRIDE
    return tl.cast(image, tl.int64) * batch_stride, y, x


@triton.jit
def load_pixels(
    image_pointer,
    start,
    y,
    x,
    real,
    k,
    height,
    width,
    channel_stride,
    row_stride,
    column_stride,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE_KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    PADDED: tl.constexpr,
):
    """[M, K]: of tokens with first pixel (y, x) the pixels k, ordered [IN_CHANNELS, KERNEL, WIDE_KERNEL]; 0 where there
    is none."""
    patch_row = k // WIDE_KERNEL
    down = patch_row % KERNEL * DILATION  # [K]
    right = k % WIDE_KERNEL * DILATION
    token_offset = start + tl.cast(y, tl.int64) * row_stride + tl.cast(x, tl.int64) * column_stride  # [M]
    pixel_offset = tl.cast(patch_row // KERNEL, tl.int64) * channel_stride + tl.cast(down, tl.int64) * row_stride
    pixel_offset += tl.cast(right, tl.int64) * column_stride
    mask = real[:, None] & ((patch_row < IN_CHANNELS * KERNEL) & (k % WIDE_KERNEL < KERNEL))[None, :]
    if PADDED:
        pixel_y = y[:, None] + down[None, :]
        pixel_x = x[:, None] + right[None, :]
        mask = mask & (pixel_y >= 0) & (pixel_y < height) & (pixel_x >= 0) & (pixel_x < width)
    return tl.load(image_pointer + token_offset[:, None] + pixel_offset[None, :], mask=mask, other=0.0)


@triton.jit
def convolve(
    image_pointer,
    weight_pointer,
    bias_pointer,
    token,
    tokens,
    rows,
    columns,
    height,
    width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE_KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [M, BLOCK_C] of tokens [M]: convolution and bias, zeros behind the channels."""
    real = token < tokens
    start, y, x = locate(token, rows, columns, batch_stride, STRIDE)
    if PADDED:
        y -= top
        x -= left
    channel = tl.arange(0, BLOCK_C)
    values = tl.zeros([token.shape[0], BLOCK_C], dtype=tl.float32)
    for first in range(0, IN_CHANNELS * KERNEL * WIDE_KERNEL, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        pixels = load_pixels(
            image_pointer, start, y, x, real, k, height, width, channel_stride, row_stride, column_stride,
            IN_CHANNELS, KERNEL, WIDE_KERNEL, DILATION, PADDED,
        )  # fmt: skip
        index = k // WIDE_KERNEL * KERNEL + k % WIDE_KERNEL  # of the pixel in a weight [IN_CHANNELS, KERNEL, KERNEL]
        there = (k // WIDE_KERNEL < IN_CHANNELS * KERNEL) & (k % WIDE_KERNEL < KERNEL)
        weight = tl.load(
            weight_pointer + channel[None, :] * (IN_CHANNELS * KERNEL * KERNEL) + index[:, None],
            mask=there[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_C]
        values += dot(pixels.to(COMPUTE_DTYPE), weight.to(COMPUTE_DTYPE), PRECISION)
    if BIASED:
        values += tl.load(bias_pointer + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def standardise(values, channel, eps, CHANNELS: tl.constexpr):
    """values [M, BLOCK_C] minus their mean over the channels, zeros behind them, and 1 / sqrt(variance + eps) [M]."""
    mean = tl.sum(values, 1) / CHANNELS
    centered = tl.where((channel < CHANNELS)[None, :], values - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / CHANNELS
    return centered, 1.0 / tl.sqrt(variance + eps)


# --------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=SIZES)
def patch_embed_kernel(
    image_pointer,  # [B, IN_CHANNELS, height, width], of any strides
    weight_pointer,  # [CHANNELS, IN_CHANNELS, KERNEL, KERNEL]
    bias_pointer,  # [CHANNELS]; read only if BIASED
    norm_weight_pointer,  # [CHANNELS]; read only if NORM
    norm_bias_pointer,  # [CHANNELS]; read only if NORM and NORM_BIASED
    output_pointer,  # [B, rows, columns, CHANNELS]
    tokens,
    rows,
    columns,
    height,
    width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    eps,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE_KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_M tokens with all their channels."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK_C)
    values = convolve(
        image_pointer, weight_pointer, bias_pointer, token, tokens, rows, columns, height, width, batch_stride,
        channel_stride, row_stride, column_stride, left, top, IN_CHANNELS, KERNEL, WIDE_KERNEL, STRIDE, DILATION,
        CHANNELS, BLOCK_C, BLOCK_K, BIASED, PADDED, COMPUTE_DTYPE, PRECISION,
    )  # fmt: skip
    if NORM:
        centered, scale = standardise(values, channel, eps, CHANNELS)
        weight = tl.load(norm_weight_pointer + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        values = centered * scale[:, None] * weight[None, :]
        if NORM_BIASED:
            values += tl.load(norm_bias_pointer + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    mask = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(output_pointer + tl.cast(token, tl.int64)[:, None] * CHANNELS + channel[None, :], values, mask=mask)


# --------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=SIZES)
def patch_embed_norm_gradient_kernel(
    image_pointer,  # [B, IN_CHANNELS, height, width], of any strides
    weight_pointer,  # [CHANNELS, IN_CHANNELS, KERNEL, KERNEL]
    bias_pointer,  # [CHANNELS]; read only if BIASED
    norm_weight_pointer,  # [CHANNELS]
    grad_output_pointer,  # of the output, [B, rows, columns, CHANNELS]
    grad_conv_pointer,  # of the convolution's values, same shape
    grad_vectors_pointer,  # [programs, 3, CHANNELS]: of the bias, the norm's weight and bias
    tokens,
    rows,
    columns,
    height,
    width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    eps,
    per_program,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE_KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: `per_program` blocks of BLOCK_M tokens, through LayerNorm, and their sums."""
    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(norm_weight_pointer + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    grad_bias = tl.zeros([BLOCK_C], dtype=tl.float32)
    grad_norm_weight = tl.zeros([BLOCK_C], dtype=tl.float32)
    grad_norm_bias = tl.zeros([BLOCK_C], dtype=tl.float32)
    for number in range(per_program):
        token = (tl.program_id(0) * per_program + number) * BLOCK_M + tl.arange(0, BLOCK_M)
        values = convolve(
            image_pointer, weight_pointer, bias_pointer, token, tokens, rows, columns, height, width, batch_stride,
            channel_stride, row_stride, column_stride, left, top, IN_CHANNELS, KERNEL, WIDE_KERNEL, STRIDE, DILATION,
            CHANNELS, BLOCK_C, BLOCK_K, BIASED, PADDED, COMPUTE_DTYPE, PRECISION,
        )  # fmt: skip
        centered, scale = standardise(values, channel, eps, CHANNELS)
        mask = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
        place = tl.cast(token, tl.int64)[:, None] * CHANNELS + channel[None, :]
        grad_output = tl.load(grad_output_pointer + place, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, centered * scale[:, None], 0.0)  # infinite behind the last token where eps is 0
        weighted = grad_output * weight
        mean = tl.sum(weighted, 1) / CHANNELS
        slope = tl.sum(weighted * normal, 1) / CHANNELS
        grad_conv = tl.where(mask, (weighted - mean[:, None] - normal * slope[:, None]) * scale[:, None], 0.0)
        tl.store(grad_conv_pointer + place, grad_conv, mask=mask)
        grad_bias += tl.sum(grad_conv, 0)
        grad_norm_weight += tl.sum(grad_output * normal, 0)
        grad_norm_bias += tl.sum(grad_output, 0)
    place = grad_vectors_pointer + tl.cast(tl.program_id(0), tl.int64) * (3 * CHANNELS) + channel
    tl.store(place, grad_bias, mask=channel < CHANNELS)
    tl.store(place + CHANNELS, grad_norm_weight, mask=channel < CHANNELS)
    tl.store(place + 2 * CHANNELS, grad_norm_bias, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def patch_embed_weight_gradient_kernel(
    image_pointer,  # [B, IN_CHANNELS, height, width], of any strides
    grad_conv_pointer,  # gradients of the convolution's values, [B, rows, columns, CHANNELS]
    grad_weight_pointer,  # [groups, IN_CHANNELS, KERNEL, KERNEL, CHANNELS]
    tokens,
    rows,
    columns,
    height,
    width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    left,
    top,
    per_program,
    IN_CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    WIDE_KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_K pixels of a patch and BLOCK_C channels, summed over `per_program` blocks of tokens."""
    PIXEL_BLOCKS: tl.constexpr = (IN_CHANNELS * KERNEL * WIDE_KERNEL + BLOCK_K - 1) // BLOCK_K
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) % (PIXEL_BLOCKS * CHANNEL_BLOCKS)
    group = tl.program_id(0) // (PIXEL_BLOCKS * CHANNEL_BLOCKS)
    k = part % PIXEL_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = part // PIXEL_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_weight = tl.zeros([BLOCK_K, BLOCK_C], dtype=tl.float32)
    for number in range(per_program):
        token = (group * per_program + number) * BLOCK_M + tl.arange(0, BLOCK_M)
        real = token < tokens
        start, y, x = locate(token, rows, columns, batch_stride, STRIDE)
        if PADDED:
            y -= top
            x -= left
        pixels = load_pixels(
            image_pointer, start, y, x, real, k, height, width, channel_stride, row_stride, column_stride,
            IN_CHANNELS, KERNEL, WIDE_KERNEL, DILATION, PADDED,
        )  # fmt: skip
        grad_conv = tl.load(
            grad_conv_pointer + tl.cast(token, tl.int64)[:, None] * CHANNELS + channel[None, :],
            mask=real[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_C]
        grad_weight += dot(tl.trans(pixels.to(COMPUTE_DTYPE)), grad_conv.to(COMPUTE_DTYPE), PRECISION)
    index = k // WIDE_KERNEL * KERNEL + k % WIDE_KERNEL
    there = (k // WIDE_KERNEL < IN_CHANNELS * KERNEL) & (k % WIDE_KERNEL < KERNEL)
    place = (
        tl.cast(group, tl.int64) * (IN_CHANNELS * KERNEL * KERNEL * CHANNELS)
        + index[:, None] * CHANNELS
        + channel[None, :]
    )
    tl.store(grad_weight_pointer + place, grad_weight, mask=there[:, None] & (channel < CHANNELS)[None, :])


# --------------------------------------------------------------------------- launches


def _shared_arguments(
    image: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    dilation: int,
    padding: list[int],
    compute_dtype: torch.dtype,
) -> dict[str, Any]:
    """What all kernels take, by name."""
    batch, in_channels, height, width = image.shape
    channels, _, kernel, _ = weight.shape
    span = dilation * (kernel - 1) + 1
    rows = (height + padding[2] + padding[3] - span) // stride + 1
    columns = (width + padding[0] + padding[1] - span) // stride + 1
    names = ("batch_stride", "channel_stride", "row_stride", "column_stride")
    return dict(zip(names, image.stride(), strict=True)) | {
        "tokens": batch * rows * columns,
        "rows": rows,
        "columns": columns,
        "height": height,
        "width": width,
        "left": padding[0],
        "top": padding[2],
        "IN_CHANNELS": in_channels,
        "KERNEL": kernel,
        "WIDE_KERNEL": triton.next_power_of_2(kernel),
        "STRIDE": stride,
        "DILATION": dilation,
        "CHANNELS": channels,
        "PADDED": any(padding),
        "COMPUTE_DTYPE": TRITON_TYPES[compute_dtype],
        "PRECISION": precision(),
    }


def channel_block(kernel: str, channels: int) -> int:
    """BLOCK_C of a kernel: whole tokens, where they are normalised."""
    return min(block(channels), MAXIMUM_CHANNEL_BLOCK) if kernel == "patch_embed_weight_gradient" else block(channels)


def pixel_count(in_channels: int, kernel: int) -> int:
    """Pixels of a patch in all channels, its rows filled up to a power of two: what kernels walk through."""
    return in_channels * kernel * triton.next_power_of_2(kernel)


def tiles_of(kernel: str, family: str, shared: dict[str, Any], block_c: int) -> dict[str, Any]:
    """BLOCK_M tokens, BLOCK_K pixels of a patch, BLOCK_C channels and a launch's options."""
    pixels = pixel_count(shared["IN_CHANNELS"], shared["KERNEL"])
    options = dict(choose(kernel, family, pixels, block_c, shared["COMPUTE_DTYPE"].primitive_bitwidth))
    block_k = min(options.pop("BLOCK_N"), block(pixels))
    options = {key: value for key, value in options.items() if not key.startswith("TAIL")}
    return options | {"BLOCK_C": block_c, "BLOCK_K": block_k}


def _tiles(kernel: str, image: torch.Tensor, shared: dict[str, Any]) -> dict[str, Any]:
    return tiles_of(kernel, family_of(image.device), shared, channel_block(kernel, shared["CHANNELS"]))


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

    Pixels and weights are rounded to `products` (float32, float16 or bfloat16), sums are float32.
    """
    shared = _shared_arguments(image, weight, stride, dilation, padding, compute_dtype)
    shape = (image.shape[0], shared["rows"], shared["columns"], weight.shape[0])
    output = image.new_empty(shape, dtype=dtype)
    if output.numel() == 0:
        return output
    tiles = _tiles("patch_embed", image, shared)
    vectors = [image if x is None else x.contiguous() for x in (bias, norm_weight, norm_bias)]
    with torch.cuda.device_of(image):
        patch_embed_kernel[(triton.cdiv(shared["tokens"], tiles["BLOCK_M"]),)](
            image, weight.contiguous(), *vectors, output, eps=eps,
            BIASED=bias is not None, NORM=norm_weight is not None, NORM_BIASED=norm_bias is not None,
            **shared, **tiles,
        )  # fmt: skip
    return output


def _norm_backward(
    grad_output: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    shared: dict[str, Any],
    grad_conv: torch.Tensor,
) -> torch.Tensor:
    """Fills gradients of the convolution's values; returns those of bias, norm_weight and norm_bias: [3, C]."""
    channels = weight.shape[0]
    tiles = _tiles("patch_embed_norm_gradient", image, shared)
    blocks = triton.cdiv(shared["tokens"], tiles["BLOCK_M"])
    per_program = triton.cdiv(blocks, PROGRAMS)
    programs = triton.cdiv(blocks, per_program)
    grad_vectors = image.new_empty(programs, 3, channels, dtype=torch.float32)
    with torch.cuda.device_of(image):
        patch_embed_norm_gradient_kernel[(programs,)](
            image, weight, weight if bias is None else bias.contiguous(), norm_weight.contiguous(), grad_output,
            grad_conv, grad_vectors, eps=eps, per_program=per_program,
            BIASED=bias is not None, **shared, **tiles,
        )  # fmt: skip
    return grad_vectors.sum(0)


def _weight_gradient(image: torch.Tensor, grad_conv: torch.Tensor, shared: dict[str, Any]) -> torch.Tensor:
    """[Cin * K * K, C]."""
    channels = shared["CHANNELS"]
    tiles = _tiles("patch_embed_weight_gradient", image, shared)
    pixels = pixel_count(shared["IN_CHANNELS"], shared["KERNEL"])
    parts = triton.cdiv(pixels, tiles["BLOCK_K"]) * triton.cdiv(channels, tiles["BLOCK_C"])
    blocks = triton.cdiv(shared["tokens"], tiles["BLOCK_M"])
    per_program = triton.cdiv(blocks * parts, PROGRAMS)
    groups = triton.cdiv(blocks, per_program)
    patch = shared["IN_CHANNELS"] * shared["KERNEL"] ** 2
    grad_weight = image.new_empty(groups, patch, channels, dtype=torch.float32)
    with torch.cuda.device_of(image):
        patch_embed_weight_gradient_kernel[(groups * parts,)](
            image, grad_conv, grad_weight, per_program=per_program, **shared, **tiles
        )
    return grad_weight.sum(0)


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
    values_wanted: bool,
    parameters_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the convolution's values [B, Ho, Wo, C], the weight, the bias, the norm's weight and bias; each is
    empty if it is not wanted or has no operand."""
    shared = _shared_arguments(image, weight, stride, dilation, padding, compute_dtype)
    grad_output, weight = grad_output.contiguous(), weight.contiguous()
    nothing = [image.new_empty(0) for _ in range(5)]
    grad_conv, vectors = grad_output, None
    if norm_weight is not None:
        grad_conv = torch.empty_like(grad_output, dtype=compute_dtype)
        vectors = _norm_backward(grad_output, image, weight, bias, norm_weight, eps, shared, grad_conv)
    wanted_grad_conv = grad_conv if values_wanted else nothing[0]
    if not parameters_wanted:
        return wanted_grad_conv, nothing[1], nothing[2], nothing[3], nothing[4]
    grad_weight = torch.empty_like(weight)
    grad_weight.flatten(1).t().copy_(_weight_gradient(image, grad_conv, shared))
    if vectors is None:
        vectors = grad_output.sum((0, 1, 2), dtype=torch.float32).expand(3, -1)
    grad_bias, grad_norm_weight, grad_norm_bias = (
        empty if x is None else row.to(x.dtype, copy=True)
        for x, row, empty in zip((bias, norm_weight, norm_bias), vectors, nothing[2:], strict=True)
    )
    return wanted_grad_conv, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias
