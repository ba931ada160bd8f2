"""The geometry of windowed attention in Triton: what kernels are compiled for, and where a window's tokens are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dot import LEAST_CHANNELS
from .tile_table import block

# integers whose value or divisibility must not compile another kernel: maps and batches change during training
SIZES = ("windows", "per_program", "height", "width", "shift_rows", "shift_columns")


class Shape(NamedTuple):
    """Constants that a kernel is compiled for."""

    heads: int
    head_dim: int
    channels: int  # heads * head_dim
    parts: tuple[int, ...]  # widths of a tile's tensors, together at least head_dim
    rows: int  # of a window, in tokens
    columns: int
    tokens: int  # rows * columns
    layout: str  # "masked", "timm", "torchvision" or "grid"
    ATTEND_PADDING: bool  # whether padding is, as in timm and torchvision
    MASKED: bool  # scores between regions are -inf
    SHIFTED: bool
    PADDED: bool  # whether windows do not divide the map
    HAS_PAD_VALUE: bool  # padding has values other than 0
    HAS_BIAS: bool
    HAS_ATTN_SCALE: bool  # AttnScale
    INDEX64: bool  # an image has 2^31 elements
    precision: str  # of float32 products


def _parts(head_dim: int, bits: int) -> tuple[int, ...]:
    """Powers of two that hold head_dim: one, or 3/4 of it or less in two; each at least what tensor cores take."""
    least = 16 if bits == 16 else LEAST_CHANNELS
    power = max(least, triton.next_power_of_2(head_dim))
    rest = max(least, triton.next_power_of_2(max(1, head_dim - power // 2)))
    return (power // 2, rest) if rest < power // 2 else (power,)


def tails_of(tokens: int, tiles: dict[str, Any]) -> dict[str, int]:
    """The blocks that hold what is left of a window's tokens behind BLOCK_M queries and BLOCK_N keys."""
    return {f"TAIL_{axis}": block(tokens % tiles[f"BLOCK_{axis}"]) for axis in "MN"}


class Problem(NamedTuple):
    """Everything that decides how an attention is launched."""

    size: tuple[int, ...]  # of qkv, [B, H, W, 3*heads*head_dim]
    dtype: torch.dtype
    device: torch.device
    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]
    layout: str
    has_bias: bool
    has_pad_token: bool
    has_attn_scale: bool
    precision: str

    @property
    def windows(self) -> int:
        """In the whole batch."""
        batch, height, width, _ = self.size
        return batch * triton.cdiv(height, self.window[0]) * triton.cdiv(width, self.window[1])

    def arguments(self) -> dict[str, Any]:
        """Arguments of all kernels besides tensors, by name."""
        names = ("height", "width", "shift_rows", "shift_columns")
        return dict(zip(names, (*self.size[1:3], *self.shift), strict=True)) | {"SHAPE": self.shape()}

    def shape(self) -> Shape:
        """Constants of the kernels; layouts that are the same on this map get the same ones."""
        _, height, width, channels = self.size
        rows, columns = self.window
        padded, shifted, layout = height % rows != 0 or width % columns != 0, any(self.shift), self.layout
        if layout == "timm" and not (padded and shifted):
            layout = "torchvision"
        if layout == "torchvision" and not padded and not shifted:
            layout = "masked"
        attended = layout in ("timm", "torchvision")
        head_dim = channels // (3 * self.heads)
        return Shape(
            heads=self.heads,
            head_dim=head_dim,
            channels=channels // 3,
            parts=_parts(head_dim, 8 * self.dtype.itemsize),
            rows=rows,
            columns=columns,
            tokens=rows * columns,
            layout=layout,
            ATTEND_PADDING=attended,
            MASKED=(padded or shifted) and not attended,
            SHIFTED=shifted,
            PADDED=padded,
            HAS_PAD_VALUE=self.has_pad_token and padded and attended,
            HAS_BIAS=self.has_bias,
            HAS_ATTN_SCALE=self.has_attn_scale,
            INDEX64=height * width * channels >= 2**31,
            precision=self.precision,
        )


class Inputs(NamedTuple):
    """The operands of one head's attention."""

    qkv: tl.tensor  # pointer to [B, H, W, 3, HEADS, HEAD_DIM], at the head
    pad_token: tl.tensor  # pointer to [3, HEADS, HEAD_DIM], at the head; read only if SHAPE.HAS_PAD_VALUE
    bias_table: tl.tensor  # pointer to [TOKENS, TOKENS], added to scores; read only if SHAPE.HAS_BIAS
    factor: tl.tensor  # w of AttnScale, 0 if not SHAPE.HAS_ATTN_SCALE
    scale: tl.tensor
    height: tl.tensor
    width: tl.tensor
    shift_rows: tl.tensor
    shift_columns: tl.tensor


class Window(NamedTuple):
    """The place of a window."""

    start: tl.tensor  # index of the image's first token, 64 bits
    row: tl.tensor  # of the window's first token on the shifted map
    column: tl.tensor
    last: tl.tensor  # in the last row of windows: 2, in the last column: + 1; there a shift brings regions together


class Tokens(NamedTuple):
    """Some tokens [T] of a window."""

    number: tl.tensor  # in the window
    start: tl.tensor  # index of the image's first token, 64 bits
    index: tl.tensor  # in the image
    real: tl.tensor  # on the map
    is_key: tl.tensor  # attended by somebody: on the map, or padding that is attended
    region: tl.tensor  # only tokens of one region attend each other; -1 where there is none


# --------------------------------------------------------------------------- where tokens are


@triton.jit
def inputs_of(
    head, qkv_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer,
    height, width, shift_rows, shift_columns, scale, SHAPE: tl.constexpr,
):  # fmt: skip
    """Arguments of a kernel -> Inputs of one head."""
    factor = 0.0
    if SHAPE.HAS_ATTN_SCALE:
        factor = tl.load(attn_scale_pointer + head).to(tl.float32)
    offset = head * SHAPE.head_dim
    bias_table = bias_pointer + tl.cast(head, tl.int64) * (SHAPE.tokens * SHAPE.tokens)
    return Inputs(
        qkv_pointer + offset,
        pad_token_pointer + offset,
        bias_table,
        factor,
        scale,
        height,
        width,
        shift_rows,
        shift_columns,
    )


@triton.jit
def locate(number, inputs, SHAPE: tl.constexpr):
    """The window of this number among all of a batch."""
    down = tl.cdiv(inputs.height, SHAPE.rows)
    across = tl.cdiv(inputs.width, SHAPE.columns)
    image = number // (down * across)
    number -= image * (down * across)
    row = number // across
    column = number - row * across
    last = 2 * (row == down - 1).to(tl.int32) + (column == across - 1).to(tl.int32)
    if SHAPE.layout != "grid":
        row *= SHAPE.rows
        column *= SHAPE.columns
    return Window(tl.cast(image, tl.int64) * inputs.height * inputs.width, row, column, last)


@triton.jit
def _unroll(position, size, shift, WINDOW: tl.constexpr, SHAPE: tl.constexpr):
    # positions on the shifted map -> positions on the map, and whether they are on it
    if SHAPE.layout == "timm":  # the map was rolled, then padded
        source, real = (position + shift) % size, position < size
    else:
        padded = size
        if SHAPE.PADDED:
            padded = tl.cdiv(size, WINDOW) * WINDOW
        source = position + shift
        source = tl.where(source >= padded, source - padded, source)
        real = source < size
    return source, real


@triton.jit
def place(number, window, inputs, SHAPE: tl.constexpr):
    """Tokens of these numbers in a window."""
    row, column = number // SHAPE.columns, number % SHAPE.columns
    is_key = number < SHAPE.tokens
    region = tl.zeros_like(number)
    if SHAPE.layout == "grid":
        row = row * (inputs.height // SHAPE.rows) + window.row
        column = column * (inputs.width // SHAPE.columns) + window.column
        real = is_key
    else:
        if SHAPE.SHIFTED:
            below = row >= SHAPE.rows - inputs.shift_rows  # from the other side of the map, in the last windows
            beyond = column >= SHAPE.columns - inputs.shift_columns
            region = (2 * below.to(tl.int32) + beyond.to(tl.int32)) & window.last
            row, on_rows = _unroll(row + window.row, inputs.height, inputs.shift_rows, SHAPE.rows, SHAPE)
            column, on_columns = _unroll(
                column + window.column, inputs.width, inputs.shift_columns, SHAPE.columns, SHAPE
            )
        else:
            row, column = row + window.row, column + window.column
            on_rows, on_columns = row < inputs.height, column < inputs.width
        real = is_key
        if SHAPE.PADDED:
            real = is_key & on_rows & on_columns
        if not SHAPE.ATTEND_PADDING:
            is_key = real
    if SHAPE.INDEX64:
        row = row.to(tl.int64)
    return Tokens(number, window.start, row * inputs.width + column, real, is_key, tl.where(is_key, region, -1))
