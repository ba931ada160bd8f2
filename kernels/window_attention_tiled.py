"""Triton kernels of attention in windows that do not fit a tile: blocks of keys with an online softmax (Milakov and
Gimelshein, arXiv 1805.02867). The backward pass: window_attention_tiled_backward.py.

AttnScale's output is (1 + w) Y - w M, Y the attention's and M the mean of the values that a query may attend.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, inputs_of, locate, place
from .window_attention_tile_ops import (
    add,
    allowed,
    combine,
    exponents_of,
    finite,
    load_bias_table,
    load_projection,
    power,
    scores_of,
    store,
    times,
    weights_of,
    zeros,
)


@triton.jit
def job_of(BLOCKS: tl.constexpr, SHAPE: tl.constexpr):
    """Block, head and window of a program."""
    program = tl.program_id(0)
    return program % BLOCKS, program // BLOCKS % SHAPE.heads, program // (BLOCKS * SHAPE.heads)


class _SoftmaxState(NamedTuple):
    """The state of an online softmax of M queries."""

    out: tl.tensor  # a tile, relative to `largest`
    largest: tl.tensor  # [M], the largest of `exponents_of`
    total: tl.tensor  # [M], relative to `largest`


@triton.jit
def online_softmax_step(
    state, q, queries, start, window, inputs, BLOCK: tl.constexpr, TAIL: tl.constexpr, SHAPE: tl.constexpr
):
    """The state after BLOCK more keys."""
    keys = place(start + tl.arange(0, BLOCK), window, inputs, True, SHAPE)
    k = load_projection(inputs, keys, 1, SHAPE)
    v = load_projection(inputs, keys, 2, SHAPE)
    bias_table = load_bias_table(inputs, queries.number, keys.number, False, SHAPE)
    scores = scores_of(q, k, queries, keys, bias_table, inputs, TAIL, SHAPE)
    larger = tl.maximum(state.largest, exponents_of(tl.max(scores, 1), inputs, SHAPE))
    base = finite(larger)
    shrink = power(state.largest - base, SHAPE)
    weights = weights_of(scores, base[:, None], inputs, SHAPE)  # [M, BLOCK]
    out = add(times(state.out, shrink[:, None], SHAPE), combine(weights, v, SHAPE), SHAPE)
    return _SoftmaxState(out, larger, state.total * shrink + tl.sum(weights, 1))


@triton.jit
def _add_values(sums, counts, queries, start, window, inputs, BLOCK: tl.constexpr, SHAPE: tl.constexpr):
    # sum of the values [M, D] that queries may attend, and their number [M], after BLOCK more keys
    keys = place(start + tl.arange(0, BLOCK), window, inputs, True, SHAPE)
    v = load_projection(inputs, keys, 2, SHAPE)
    weights = allowed(queries, keys)
    return add(sums, combine(weights, v, SHAPE), SHAPE), counts + tl.sum(weights, 1)


@triton.jit
def mean_values(
    queries, window, inputs,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The mean of the values that queries may attend, a tile, and 1 / their number [QUERIES]."""
    FULL: tl.constexpr = SHAPE.keys if TAIL_N == BLOCK_N else SHAPE.keys // BLOCK_N * BLOCK_N
    sums, counts = zeros(QUERIES, SHAPE), tl.zeros([QUERIES], dtype=tl.float32)
    for key in range(0, FULL, BLOCK_N):
        sums, counts = _add_values(sums, counts, queries, key, window, inputs, BLOCK_N, SHAPE)
    if SHAPE.keys > FULL:
        sums, counts = _add_values(sums, counts, queries, FULL, window, inputs, TAIL_N, SHAPE)
    inverse = 1.0 / tl.maximum(counts, 1.0)
    return times(sums, inverse[:, None], SHAPE), inverse


@triton.jit
def _forward_queries(
    inputs, output_pointer, largest_pointer, inverse_pointer, start, window,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # QUERIES queries from `start` on, through all keys: blocks of BLOCK_N, then one of TAIL_N if they do not divide
    LN2: tl.constexpr = 0.6931471805599453
    FULL: tl.constexpr = SHAPE.keys if TAIL_N == BLOCK_N else SHAPE.keys // BLOCK_N * BLOCK_N  # keys in blocks
    queries = place(start + tl.arange(0, QUERIES), window, inputs, False, SHAPE)
    q = load_projection(inputs, queries, 0, SHAPE)
    largest = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    state = _SoftmaxState(zeros(QUERIES, SHAPE), largest, tl.zeros([QUERIES], dtype=tl.float32))
    for key in range(0, FULL, BLOCK_N):
        state = online_softmax_step(state, q, queries, key, window, inputs, BLOCK_N, FULL % BLOCK_N != 0, SHAPE)
    if SHAPE.keys > FULL:
        state = online_softmax_step(state, q, queries, FULL, window, inputs, TAIL_N, True, SHAPE)
    inverse = 1.0 / state.total
    if SHAPE.HAS_ATTN_SCALE:
        means, _ = mean_values(queries, window, inputs, QUERIES, BLOCK_N, TAIL_N, SHAPE)
        out = times(state.out, ((1.0 + inputs.factor) * inverse)[:, None], SHAPE)
        out = add(out, times(means, -inputs.factor, SHAPE), SHAPE)
    else:
        out = times(state.out, inverse[:, None], SHAPE)
    store(output_pointer, out, queries, SHAPE.channels, SHAPE)
    row = (queries.start + queries.index) * SHAPE.heads
    largest = state.largest if SHAPE.EXACT else state.largest * LN2
    tl.store(largest_pointer + row, largest, mask=queries.real)
    tl.store(inverse_pointer + row, inverse, mask=queries.real)


@triton.jit(do_not_specialize=SIZES)
def window_attention_tiled_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    largest_pointer,  # [B, D, H, W, HEADS], largest score of each query
    inverse_pointer,  # [B, D, H, W, HEADS], 1 / sum of exp(score - largest)
    depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_M queries, or the last TAIL_M, of one window and head."""
    BLOCKS: tl.constexpr = (SHAPE.tokens + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = BLOCKS if TAIL_M == BLOCK_M else SHAPE.tokens // BLOCK_M
    block, head, number = job_of(BLOCKS, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    window = locate(number, inputs, SHAPE)
    output_pointer += head * SHAPE.head_dim
    largest_pointer += head
    inverse_pointer += head
    if block < FULL:
        _forward_queries(
            inputs, output_pointer, largest_pointer, inverse_pointer, block * BLOCK_M, window,
            BLOCK_M, BLOCK_N, TAIL_N, SHAPE,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _forward_queries(
            inputs, output_pointer, largest_pointer, inverse_pointer, FULL * BLOCK_M, window,
            TAIL_M, BLOCK_N, TAIL_N, SHAPE,
        )  # fmt: skip
