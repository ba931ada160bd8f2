"""The geometry of windowed attention in Triton: what kernels are compiled for, and where a window's tokens are.

A map of two axes is one of three with a depth of 1, left out where kernels are compiled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .dot import LEAST_CHANNELS
from .tile_table import block

# integers whose value or divisibility must not compile another kernel: maps and batches change during training
SIZES = (
    "windows", "per_program", "chunks", "blocks", "depth", "shift_planes", "height", "width", "shift_rows",
    "shift_columns",
)  # fmt: skip

Size = tuple[int, ...]


class Shape(NamedTuple):
    """Constants that a kernel is compiled for."""

    heads: int
    head_dim: int
    channels: int  # heads * head_dim
    parts: Size  # widths of a tile's tensors, together at least head_dim
    window: Size  # planes, rows and columns of queries
    key_window: Size  # of keys: window, or more with it in the middle
    tokens: int  # queries of a window
    keys: int
    strides: Size  # from one token of q, k, v to the next
    grad_strides: Size  # of their gradients
    layout: str  # "masked", "timm", "torchvision" or "grid"
    FUSED: bool  # q, k, v are channels of one map
    FUSED_GRADIENT: bool  # and so are their gradients
    HAS_DEPTH: bool  # the map has three axes
    OVERLAP: bool  # windows of keys are larger than those of queries
    ATTEND_PADDING: bool  # whether padding is, as in timm and torchvision
    MASKED: bool  # scores between regions are -inf
    SHIFTED: bool
    PADDED: bool  # whether windows do not divide the map
    HAS_PAD_VALUE: bool  # padding has values other than 0
    HAS_BIAS: bool
    HAS_ATTN_SCALE: bool  # AttnScale
    HAS_HEAD_SCALE: bool
    RAW_SCORES: bool  # scores are products of q and k: what follows needs no other unit, and keeps their order
    EXACT: bool  # weights have the accuracy of float32, which rounding of large exponents would take
    INDEX64: bool  # an image has 2^31 elements
    precision: str  # of float32 products
    score_precision: str  # of scores, whose errors the exponential multiplies


def _parts(head_dim: int, bits: int) -> Size:
    """Powers of two that hold head_dim: one, or 3/4 of it or less in two; each at least what tensor cores take."""
    least = 16 if bits == 16 else LEAST_CHANNELS
    power = max(least, triton.next_power_of_2(head_dim))
    rest = max(least, triton.next_power_of_2(max(1, head_dim - power // 2)))
    return (power // 2, rest) if rest < power // 2 else (power,)


def _score_precision(parts: Size) -> str:
    """Of float32, with half the error of tf32x3 where it can be: bfloat16 is multiplied 16 channels at a time (of 8
    Triton 3.8 takes each twice), and for heads in two parts there are not enough registers."""
    return "bf16x6" if len(parts) == 1 and parts[0] >= 16 else "tf32x3"


def tails_of(tokens: int, keys: int, tiles: dict[str, Any]) -> dict[str, int]:
    """The blocks that hold what is left of a window's queries and keys behind blocks of BLOCK_M and BLOCK_N."""
    return {f"TAIL_{axis}": block(n % tiles[f"BLOCK_{axis}"]) for axis, n in (("M", tokens), ("N", keys))}


class Problem(NamedTuple):
    """Everything that decides how an attention is launched."""

    size: Size  # of the map, (H, W) or (D, H, W)
    batch: int
    channels: int  # heads * head_dim
    strides: Size  # from one token of q, k, v to the next
    fused: bool  # q, k, v are channels of one map
    dtype: torch.dtype
    device: torch.device
    heads: int
    window: Size
    shift: Size
    kv_window: Size  # empty: as window
    layout: str
    has_bias: bool
    has_pad_token: bool
    has_attn_scale: bool
    has_head_scale: bool
    positive_scale: bool
    precision: str

    @property
    def windows(self) -> int:
        """In the whole batch."""
        return self.batch * math.prod(map(triton.cdiv, self.size, self.window))

    def arguments(self) -> dict[str, Any]:
        """Arguments of all kernels besides tensors, by name."""
        sizes = dict(zip(("depth", "height", "width"), _three(self.size, 1), strict=True))
        shifts = dict(zip(("shift_planes", "shift_rows", "shift_columns"), _three(self.shift, 0), strict=True))
        return sizes | shifts | {"SHAPE": self.shape()}

    def shape(self) -> Shape:
        """Constants of the kernels; layouts that are the same on this map get the same ones."""
        padded = any(n % w != 0 for n, w in zip(self.size, self.window, strict=True))
        shifted, overlap = any(self.shift), self.kv_window not in ((), self.window)
        layout, keys = self.layout, self.kv_window or self.window
        exact = self.dtype == torch.float32 and self.precision != "tf32"
        parts = _parts(self.channels // self.heads, 8 * self.dtype.itemsize)
        if layout == "timm" and not (padded and shifted):
            layout = "torchvision"
        if layout == "torchvision" and not (padded or shifted or overlap):
            layout = "masked"
        attended = layout in ("timm", "torchvision")
        grad_stride = 3 * self.channels if self.fused else self.channels
        kv_grad_stride = self.channels if overlap else grad_stride  # for each window
        return Shape(
            heads=self.heads,
            head_dim=self.channels // self.heads,
            channels=self.channels,
            parts=parts,
            window=_three(self.window, 1),
            key_window=_three(keys, 1),
            tokens=math.prod(self.window),
            keys=math.prod(keys),
            strides=self.strides,
            grad_strides=(grad_stride, kv_grad_stride, kv_grad_stride),
            layout=layout,
            FUSED=self.fused,
            FUSED_GRADIENT=self.fused and not overlap,
            HAS_DEPTH=len(self.size) == 3,
            OVERLAP=overlap,
            ATTEND_PADDING=attended,
            MASKED=(padded or shifted or overlap) and not attended,
            SHIFTED=shifted,
            PADDED=padded,
            HAS_PAD_VALUE=self.has_pad_token and (padded or overlap) and attended,
            HAS_BIAS=self.has_bias,
            HAS_ATTN_SCALE=self.has_attn_scale,
            HAS_HEAD_SCALE=self.has_head_scale,
            RAW_SCORES=self.positive_scale and not (self.has_bias or self.has_head_scale or (shifted and attended)),
            EXACT=exact,
            INDEX64=math.prod(self.size) * max(*self.strides, grad_stride) >= 2**31,
            precision=self.precision,
            score_precision=_score_precision(parts) if exact else self.precision,
        )


def _three(numbers: Size, first: int) -> Size:
    """A number for each of three axes, `first` for the depth of a map of two."""
    return numbers if len(numbers) == 3 else (first, *numbers)


class Inputs(NamedTuple):
    """The operands of one head's attention."""

    q: tl.tensor  # pointer to [B, D, H, W, HEADS, HEAD_DIM], at the head, as the next two
    k: tl.tensor
    v: tl.tensor
    pad_token: tl.tensor  # pointer to [3, HEADS, HEAD_DIM], at the head; read only if SHAPE.HAS_PAD_VALUE
    bias_table: tl.tensor  # pointer to [TOKENS, KEYS], added to scores; read only if SHAPE.HAS_BIAS
    factor: tl.tensor  # w of AttnScale, 0 if not SHAPE.HAS_ATTN_SCALE
    scale: tl.tensor
    depth: tl.tensor
    height: tl.tensor
    width: tl.tensor
    shift_planes: tl.tensor
    shift_rows: tl.tensor
    shift_columns: tl.tensor


class Window(NamedTuple):
    """The place of a window."""

    number: tl.tensor  # among all of a batch
    start: tl.tensor  # index of the image's first token, 64 bits
    plane: tl.tensor  # of the window's first token on the shifted map
    row: tl.tensor
    column: tl.tensor
    last: tl.tensor  # of its axis: 4 for planes + 2 for rows + 1 for columns; there a shift brings regions together


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
    head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
    depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE: tl.constexpr,
):  # fmt: skip
    """Arguments of a kernel -> Inputs of one head."""
    factor = 0.0
    if SHAPE.HAS_ATTN_SCALE:
        factor = tl.load(attn_scale_pointer + head).to(tl.float32)
    if SHAPE.HAS_HEAD_SCALE:
        scale *= tl.load(head_scale_pointer + head).to(tl.float32)
    offset = head * SHAPE.head_dim
    q = q_pointer + offset
    k, v = kv_of(q, k_pointer + offset, v_pointer + offset, SHAPE.FUSED, SHAPE)
    bias_table = bias_pointer + tl.cast(head, tl.int64) * (SHAPE.tokens * SHAPE.keys)
    return Inputs(
        q,
        k,
        v,
        pad_token_pointer + offset,
        bias_table,
        factor,
        scale,
        depth,
        height,
        width,
        shift_planes,
        shift_rows,
        shift_columns,
    )


@triton.jit
def kv_of(q, k, v, FUSED: tl.constexpr, SHAPE: tl.constexpr):
    """Pointers to k and v, or to their gradients, from those of q, k and v; FUSED: q's is that of all three."""
    if FUSED:
        k, v = q + SHAPE.channels, q + 2 * SHAPE.channels
    return k, v


@triton.jit
def locate(number, inputs, SHAPE: tl.constexpr):
    """The window of this number among all of a batch."""
    down = tl.cdiv(inputs.height, SHAPE.window[1])
    across = tl.cdiv(inputs.width, SHAPE.window[2])
    image = number // (down * across)
    rest = number - image * (down * across)
    row = rest // across
    column = rest - row * across
    last = 2 * (row == down - 1).to(tl.int32) + (column == across - 1).to(tl.int32)
    plane = 0
    tokens = inputs.height
    if SHAPE.HAS_DEPTH:
        deep = tl.cdiv(inputs.depth, SHAPE.window[0])
        plane = image % deep
        image = image // deep
        last += 4 * (plane == deep - 1).to(tl.int32)
        tokens *= inputs.depth
    if SHAPE.layout != "grid":
        plane *= SHAPE.window[0]
        row *= SHAPE.window[1]
        column *= SHAPE.window[2]
    return Window(number, tl.cast(image, tl.int64) * tokens * inputs.width, plane, row, column, last)


@triton.jit
def _on_map(position, size, shift, AXIS: tl.constexpr, KEYS: tl.constexpr, SHAPE: tl.constexpr):
    # along one axis, positions on the shifted map -> positions on the map, and whether they are on it
    if SHAPE.SHIFTED and SHAPE.layout == "timm":  # the map was rolled, then padded
        source, real = (position + shift) % size, position < size
    elif SHAPE.SHIFTED:
        padded = size
        if SHAPE.PADDED:
            padded = tl.cdiv(size, SHAPE.window[AXIS]) * SHAPE.window[AXIS]
        source = position + shift
        source = tl.where(source >= padded, source - padded, source)
        real = source < size
    elif KEYS and SHAPE.OVERLAP:
        source = position - (SHAPE.key_window[AXIS] - SHAPE.window[AXIS]) // 2
        real = (source >= 0) & (source < size)
    else:
        source, real = position, position < size
    return source, real


@triton.jit
def place(number, window, inputs, KEYS: tl.constexpr, SHAPE: tl.constexpr):
    """Tokens of these numbers in a window, as queries or as KEYS."""
    COUNT: tl.constexpr = SHAPE.keys if KEYS else SHAPE.tokens
    PLANES: tl.constexpr = SHAPE.key_window[0] if KEYS else SHAPE.window[0]
    ROWS: tl.constexpr = SHAPE.key_window[1] if KEYS else SHAPE.window[1]
    COLUMNS: tl.constexpr = SHAPE.key_window[2] if KEYS else SHAPE.window[2]
    row, column = number // COLUMNS, number % COLUMNS
    plane = row
    if SHAPE.HAS_DEPTH:
        plane, row = row // ROWS, row % ROWS
    is_key = number < COUNT
    region = tl.zeros_like(number)
    real = is_key
    if SHAPE.layout == "grid":
        row = row * (inputs.height // ROWS) + window.row
        column = column * (inputs.width // COLUMNS) + window.column
        if SHAPE.HAS_DEPTH:
            plane = plane * (inputs.depth // PLANES) + window.plane
    else:
        if SHAPE.SHIFTED:
            below = row >= ROWS - inputs.shift_rows  # from the other side of the map, in the last windows
            beyond = column >= COLUMNS - inputs.shift_columns
            region = 2 * below.to(tl.int32) + beyond.to(tl.int32)
            if SHAPE.HAS_DEPTH:
                region += 4 * (plane >= PLANES - inputs.shift_planes).to(tl.int32)
            region &= window.last
        row, on_rows = _on_map(row + window.row, inputs.height, inputs.shift_rows, 1, KEYS, SHAPE)
        column, on_columns = _on_map(column + window.column, inputs.width, inputs.shift_columns, 2, KEYS, SHAPE)
        on_map = on_rows & on_columns
        if SHAPE.HAS_DEPTH:
            plane, on_planes = _on_map(plane + window.plane, inputs.depth, inputs.shift_planes, 0, KEYS, SHAPE)
            on_map &= on_planes
        if SHAPE.PADDED or (KEYS and SHAPE.OVERLAP):
            real = is_key & on_map
        if not SHAPE.ATTEND_PADDING:
            is_key = real
    if SHAPE.INDEX64:
        row = row.to(tl.int64)
    if SHAPE.HAS_DEPTH:
        row += plane * inputs.height
    return Tokens(number, window.start, row * inputs.width + column, real, is_key, tl.where(is_key, region, -1))
