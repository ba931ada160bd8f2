"""Shared by the Triton kernels of windowed attention: tiles in and out, arithmetic of tiles, scores.

A tile of tokens is a tuple of one or two tensors [T, channels]: head_dim 45 is 32 + 16 channels, not 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dot import dot
from .window_attention_geometry import Tokens

# --------------------------------------------------------------------------- tiles in and out


@triton.jit
def _elements(pointer, tokens, STRIDE: tl.constexpr, PART: tl.constexpr, SHAPE: tl.constexpr):
    # pointers to one part of the channels of tokens, [T, D], and which of them are there
    channel = PART * SHAPE.parts[0] + tl.arange(0, SHAPE.parts[PART])
    mask = tokens.real[:, None] & (channel < SHAPE.head_dim)[None, :]
    return pointer + tokens.start * STRIDE + tokens.index[:, None] * STRIDE + channel[None, :], mask


@triton.jit
def load(pointer, tokens, STRIDE: tl.constexpr, SHAPE: tl.constexpr):
    """A tile, zeros for tokens that are not on the map and behind head_dim."""
    tile = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        elements, mask = _elements(pointer, tokens, STRIDE, part, SHAPE)
        tile += (tl.load(elements, mask=mask, other=0.0),)
    return tile


@triton.jit
def load_projection(inputs, tokens, WHICH: tl.constexpr, SHAPE: tl.constexpr):
    """q (0), k (1) or v (2) of tokens. Padding has the k and v of `inputs.pad_token`; nobody looks at its q."""
    pointer = inputs.q if WHICH == 0 else (inputs.k if WHICH == 1 else inputs.v)
    tile = load(pointer, tokens, SHAPE.strides[WHICH], SHAPE)
    if SHAPE.HAS_PAD_VALUE and WHICH > 0:
        is_padding = tokens.is_key & ~tokens.real
        filled = ()  # type: tuple[object, ...]
        for part in tl.static_range(len(SHAPE.parts)):
            channel = part * SHAPE.parts[0] + tl.arange(0, SHAPE.parts[part])
            mask = is_padding[:, None] & (channel < SHAPE.head_dim)[None, :]
            elements = inputs.pad_token + WHICH * SHAPE.channels + channel[None, :] + tl.zeros_like(mask).to(tl.int32)
            filled += (tl.load(elements, mask=mask, other=tile[part]),)
        tile = filled
    return tile


@triton.jit
def store(pointer, tile, tokens, STRIDE: tl.constexpr, SHAPE: tl.constexpr):
    """The reverse of `load`, in the pointer's type."""
    for part in tl.static_range(len(SHAPE.parts)):
        elements, mask = _elements(pointer, tokens, STRIDE, part, SHAPE)
        tl.store(elements, tile[part].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_kv_gradient(pointer, tile, keys, window, WHICH: tl.constexpr, SHAPE: tl.constexpr):
    """The gradient of k (1) or v (2): on the map, or to [windows, KEYS, channels] where windows of keys overlap."""
    tokens = keys
    if SHAPE.OVERLAP:
        start = tl.cast(window.number, tl.int64) * SHAPE.keys
        tokens = Tokens(keys.number, start, keys.number, keys.real, keys.is_key, keys.region)
    store(pointer, tile, tokens, SHAPE.grad_strides[WHICH], SHAPE)


@triton.jit
def store_padding_sums(pointer, tile, place, WHICH: tl.constexpr, tokens, SHAPE: tl.constexpr):
    """Sums of a tile over the tokens that are padding, if there are some, to [.., 2, HEAD_DIM] at [place, WHICH]."""
    is_padding = tokens.is_key & ~tokens.real
    if tl.max(is_padding.to(tl.int32), 0) > 0:
        pointer += (tl.cast(place, tl.int64) * 2 + WHICH) * SHAPE.head_dim
        for part in tl.static_range(len(SHAPE.parts)):
            channel = part * SHAPE.parts[0] + tl.arange(0, SHAPE.parts[part])
            sums = tl.sum(tl.where(is_padding[:, None], tile[part], 0.0), 0)
            tl.store(pointer + channel, sums, mask=channel < SHAPE.head_dim)


@triton.jit
def load_bias_table(inputs, queries, keys, TRANSPOSED: tl.constexpr, SHAPE: tl.constexpr):
    """Entries of one head's bias [TOKENS, KEYS] for queries and keys of these numbers, as float32, [M, N], or [N, M] if
    TRANSPOSED; 0.0 without a bias."""
    bias_table = 0.0
    if SHAPE.HAS_BIAS:
        if TRANSPOSED:
            mask = (keys < SHAPE.keys)[:, None] & (queries < SHAPE.tokens)[None, :]
            elements = inputs.bias_table + keys[:, None] + queries[None, :] * SHAPE.keys
        else:
            mask = (queries < SHAPE.tokens)[:, None] & (keys < SHAPE.keys)[None, :]
            elements = inputs.bias_table + queries[:, None] * SHAPE.keys + keys[None, :]
        bias_table = tl.load(elements, mask=mask, other=0.0).to(tl.float32)
    return bias_table


@triton.jit
def store_bias_gradient(pointer, tile, place, queries, keys, SHAPE: tl.constexpr):
    """A tile [M, N] of queries and keys of these numbers to [.., TOKENS, KEYS] at `place`."""
    start = pointer + tl.cast(place, tl.int64) * (SHAPE.tokens * SHAPE.keys)
    mask = (queries < SHAPE.tokens)[:, None] & (keys < SHAPE.keys)[None, :]
    tl.store(start + queries[:, None] * SHAPE.keys + keys[None, :], tile, mask=mask)


# --------------------------------------------------------------------------- arithmetic of tiles


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], dtype=tl.float32)  # Triton 3.6 takes no element of a tuple in a list


@triton.jit
def zeros(ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """A tile of float32 zeros."""
    tile = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        tile += (_zeros(ROWS, SHAPE.parts[part]),)
    return tile


@triton.jit
def inner(a, b, PRECISION: tl.constexpr, SHAPE: tl.constexpr):
    """Tiles of M and N tokens -> [M, N], products over the channels."""
    product = dot(a[0], tl.trans(b[0]), PRECISION)
    if len(SHAPE.parts) == 2:
        product += dot(a[1], tl.trans(b[1]), PRECISION)
    return product


@triton.jit
def combine(weights, tile, SHAPE: tl.constexpr):
    """weights [M, N] @ a tile of N tokens -> a tile of M tokens, float32."""
    result = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        result += (dot(weights.to(tile[part].dtype), tile[part], tl.constexpr(SHAPE.precision)),)
    return result


@triton.jit
def combine_transposed(weights, tile, SHAPE: tl.constexpr):
    """The same with weights [N, M]."""
    result = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        result += (dot(tl.trans(weights.to(tile[part].dtype)), tile[part], tl.constexpr(SHAPE.precision)),)
    return result


@triton.jit
def add(a, b, SHAPE: tl.constexpr):
    """The sum of two tuples."""
    result = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        result += (a[part] + b[part],)
    return result


@triton.jit
def times(tile, factor, SHAPE: tl.constexpr):
    """Each tensor of a tuple times a factor."""
    result = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        result += (tile[part] * factor,)
    return result


@triton.jit
def row_sums(a, b, SHAPE: tl.constexpr):
    """[T], sums over the channels of the products of two tiles."""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(SHAPE.parts) == 2:
        sums += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return sums


# --------------------------------------------------------------------------- scores


@triton.jit
def allowed(a, b):
    """[M, N] as 0.0 or 1.0: whether tokens attend each other."""
    return tl.where(a.region[:, None] == b.region[None, :], 1.0, 0.0)


@triton.jit
def scores_of(a, b, rows, columns, bias_table, inputs, TAIL: tl.constexpr, SHAPE: tl.constexpr):
    """Tiles a of `rows` and b of `columns`, queries and keys or the reverse -> scores [M, N], before they are scaled if
    SHAPE.RAW_SCORES. With TAIL some columns are keys that are not there; such rows may have any score, as nobody sums
    over rows."""
    REGION_SCORE: tl.constexpr = -100.0  # where padding is attended, this on scores of tokens of different regions
    scores = inner(a, b, tl.constexpr(SHAPE.score_precision), SHAPE)
    if not SHAPE.RAW_SCORES:
        scores *= inputs.scale
    if SHAPE.HAS_BIAS:
        scores += bias_table
    if SHAPE.MASKED:
        scores = tl.where(rows.region[:, None] == columns.region[None, :], scores, float("-inf"))
    else:
        if SHAPE.SHIFTED:
            scores = tl.where(rows.region[:, None] == columns.region[None, :], scores, scores + REGION_SCORE)
        if TAIL:
            scores = tl.where(columns.is_key[None, :], scores, float("-inf"))
    return scores


@triton.jit
def exponents_of(scores, inputs, SHAPE: tl.constexpr):
    """Scores of `scores_of` -> what weights are relative to: the binary logarithms of their exp, or the scores
    themselves, scaled, if SHAPE.EXACT."""
    LOG2E: tl.constexpr = 1.4426950408889634
    unit = 1.0 if SHAPE.EXACT else LOG2E
    if SHAPE.RAW_SCORES:
        unit = inputs.scale * unit
    return scores * unit


@triton.jit
def power(exponents, SHAPE: tl.constexpr):
    """exp of differences of exponents of `exponents_of`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if SHAPE.EXACT:
        exponents *= LOG2E
    return tl.exp2(exponents)


@triton.jit
def weights_of(scores, exponents, inputs, SHAPE: tl.constexpr):
    """exp of scores over that of exponents, which are of `exponents_of` or, unless SHAPE.EXACT, added to such: one
    multiplication and addition for each score. The largest weight is 1 but for the rounding of its exponent, which a
    row's weights have in common."""
    return power(exponents_of(scores, inputs, SHAPE) - exponents, SHAPE)


@triton.jit
def finite(exponents):
    """Largest exponents that can be subtracted: a row without keys has -inf; 0 instead leaves weights of 0, not NaN."""
    return tl.where(exponents == float("-inf"), 0.0, exponents)
