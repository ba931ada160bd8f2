"""Triton kernels of the backward pass of attention in windows that do not fit a tile: for q, for k and v, and for the
bias. Each finds the weights again, as in FlashAttention-2 (arXiv 2307.08691).

With AttnScale, output = (1 + w) Y - w M, the attention's gradient is (1 + w) gradient @ v, and its mean under the
attention is <gradient, output> + w <gradient, M>: nothing is divided by 1 + w.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, inputs_of, kv_of, locate, place
from .window_attention_tile_ops import (
    add,
    allowed,
    combine,
    inner,
    load,
    load_bias_table,
    load_projection,
    row_sums,
    scores_of,
    store,
    store_bias_gradient,
    store_kv_gradient,
    store_padding_sums,
    times,
    weights_of,
    zeros,
)
from .window_attention_tiled import job_of, mean_values


class _QueryStatistics(NamedTuple):
    """Pointers to numbers [B, D, H, W, HEADS] about queries, at a head."""

    exponents: tl.tensor  # binary logarithms of sums of exp(score): `weights_of` these are the attention's
    delta: tl.tensor  # sum of attention * its gradient, times 1 + w
    share: tl.tensor  # w / number of keys; used only if SHAPE.HAS_ATTN_SCALE


@triton.jit
def _load_statistic(pointer, queries, OTHER: tl.constexpr, SHAPE: tl.constexpr):
    # [M]; infinite exponents make every weight 0
    row = (queries.start + queries.index) * SHAPE.heads
    return tl.load(pointer + row, mask=queries.real, other=OTHER)


@triton.jit
def _score_gradient(weights, products, delta, factor, SHAPE: tl.constexpr):
    # the gradient of scores from products, gradient @ v
    if SHAPE.HAS_ATTN_SCALE:
        products *= 1.0 + factor
    return weights * (products - delta)


class _Queries(NamedTuple):
    """M queries, with all that their gradient is made of."""

    tokens: tl.tensor
    q: tl.tensor  # a tile, as the next
    grad_output: tl.tensor
    exponents: tl.tensor  # [M], as the next
    delta: tl.tensor


@triton.jit
def _add_q_gradient(
    grad_q, sums, queries, start, window, inputs, BLOCK: tl.constexpr, TAIL: tl.constexpr, SHAPE: tl.constexpr
):
    # grad_q, a tile, and sums [M] after BLOCK more keys, as far as scales need them: of attention times its gradient,
    # times the products of q and k, and times both
    keys = place(start + tl.arange(0, BLOCK), window, inputs, True, SHAPE)
    k = load_projection(inputs, keys, 1, SHAPE)
    v = load_projection(inputs, keys, 2, SHAPE)
    bias_table = load_bias_table(inputs, queries.tokens.number, keys.number, False, SHAPE)
    scores = scores_of(queries.q, k, queries.tokens, keys, bias_table, inputs, TAIL, SHAPE)
    weights = weights_of(scores, queries.exponents[:, None], inputs, SHAPE)  # [M, BLOCK]
    grad_weights = inner(queries.grad_output, v, SHAPE)
    of_gradients, of_products, of_both = sums
    if SHAPE.HAS_ATTN_SCALE or SHAPE.HAS_HEAD_SCALE:
        of_gradients += tl.sum(weights * grad_weights, 1)
    if SHAPE.HAS_HEAD_SCALE:
        weighted = weights * inner(queries.q, k, SHAPE)
        of_products += tl.sum(weighted, 1)
        of_both += tl.sum(weighted * grad_weights, 1)
    grad_scores = _score_gradient(weights, grad_weights, queries.delta[:, None], inputs.factor, SHAPE)
    return add(grad_q, combine(grad_scores, k, SHAPE), SHAPE), (of_gradients, of_products, of_both)


@triton.jit
def _q_gradient(
    inputs, saved, largest_pointer, inverse_pointer, output_pointer, grad_output_pointer, grad_q_pointer,
    grad_attn_scale_pointer, grad_head_scale_pointer, start, window,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # the gradient of QUERIES queries from `start` on, through all keys
    LOG2E: tl.constexpr = 1.4426950408889634
    FULL: tl.constexpr = SHAPE.keys if TAIL_N == BLOCK_N else SHAPE.keys // BLOCK_N * BLOCK_N  # keys in blocks
    tokens = place(start + tl.arange(0, QUERIES), window, inputs, False, SHAPE)
    row = (tokens.start + tokens.index) * SHAPE.heads
    largest = _load_statistic(largest_pointer, tokens, float("inf"), SHAPE)
    exponents = largest * LOG2E - tl.log2(_load_statistic(inverse_pointer, tokens, 1.0, SHAPE))
    grad_output = load(grad_output_pointer, tokens, SHAPE.channels, SHAPE)
    delta = row_sums(load(output_pointer, tokens, SHAPE.channels, SHAPE), grad_output, SHAPE)
    of_means = tl.zeros([QUERIES], dtype=tl.float32)  # gradient * mean of values, summed over the channels
    if SHAPE.HAS_ATTN_SCALE:
        means, inverse_counts = mean_values(tokens, window, inputs, QUERIES, BLOCK_N, TAIL_N, SHAPE)
        of_means = row_sums(means, grad_output, SHAPE)
        delta += inputs.factor * of_means
        tl.store(saved.share + row, inputs.factor * inverse_counts, mask=tokens.real)
    tl.store(saved.delta + row, delta, mask=tokens.real)
    tl.store(saved.exponents + row, exponents, mask=tokens.real)
    queries = _Queries(tokens, load_projection(inputs, tokens, 0, SHAPE), grad_output, exponents, delta)
    grad_q, zero = zeros(QUERIES, SHAPE), tl.zeros([QUERIES], dtype=tl.float32)
    sums = (zero, zero, zero)
    for key in range(0, FULL, BLOCK_N):
        grad_q, sums = _add_q_gradient(grad_q, sums, queries, key, window, inputs, BLOCK_N, FULL % BLOCK_N != 0, SHAPE)
    if SHAPE.keys > FULL:
        grad_q, sums = _add_q_gradient(grad_q, sums, queries, FULL, window, inputs, TAIL_N, True, SHAPE)
    store(grad_q_pointer, times(grad_q, inputs.scale, SHAPE), tokens, SHAPE.grad_strides[0], SHAPE)
    if SHAPE.HAS_ATTN_SCALE:
        tl.store(grad_attn_scale_pointer + tl.program_id(0), tl.sum(sums[0] - of_means, 0))
    if SHAPE.HAS_HEAD_SCALE:
        # of sums that nothing was rounded in, as delta and grad_q were: what is left of them is small
        grad_scale = tl.sum(sums[2] - sums[0] * sums[1], 0)
        if SHAPE.HAS_ATTN_SCALE:
            grad_scale *= 1.0 + inputs.factor
        tl.store(grad_head_scale_pointer + tl.program_id(0), grad_scale)


@triton.jit(do_not_specialize=SIZES)
def window_attention_q_gradient_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    grad_output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    exponents_pointer,  # [B, D, H, W, HEADS], as the next two: written, for the other kernels
    delta_pointer,
    share_pointer,
    largest_pointer,  # [B, D, H, W, HEADS]
    inverse_pointer,  # [B, D, H, W, HEADS]
    output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    grad_q_pointer,  # as q, tokens SHAPE.grad_strides apart
    grad_attn_scale_pointer,  # [windows, HEADS, blocks of queries]; written only if SHAPE.HAS_ATTN_SCALE
    grad_head_scale_pointer,  # the same, less a factor of `scale`; written only if SHAPE.HAS_HEAD_SCALE
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
    saved = _QueryStatistics(exponents_pointer + head, delta_pointer + head, share_pointer + head)
    window = locate(number, inputs, SHAPE)
    offset = head * SHAPE.head_dim
    if block < FULL:
        _q_gradient(
            inputs, saved, largest_pointer + head, inverse_pointer + head, output_pointer + offset,
            grad_output_pointer + offset, grad_q_pointer + offset, grad_attn_scale_pointer,
            grad_head_scale_pointer, block * BLOCK_M, window, BLOCK_M, BLOCK_N, TAIL_N, SHAPE,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _q_gradient(
            inputs, saved, largest_pointer + head, inverse_pointer + head, output_pointer + offset,
            grad_output_pointer + offset, grad_q_pointer + offset, grad_attn_scale_pointer,
            grad_head_scale_pointer, FULL * BLOCK_M, window, TAIL_M, BLOCK_N, TAIL_N, SHAPE,
        )  # fmt: skip


class _Keys(NamedTuple):
    """N keys, with all that their gradient is made of."""

    tokens: tl.tensor
    k: tl.tensor  # a tile, as the next
    v: tl.tensor


@triton.jit
def _add_kv_gradient(
    grad_k, grad_v, keys, grad_output_pointer, saved, start, window, inputs, BLOCK: tl.constexpr, SHAPE: tl.constexpr
):
    # grad_k, grad_v, tiles of N keys, after BLOCK more queries; scores and weights are transposed, [N, BLOCK]
    queries = place(start + tl.arange(0, BLOCK), window, inputs, False, SHAPE)
    q = load_projection(inputs, queries, 0, SHAPE)
    grad_output = load(grad_output_pointer, queries, SHAPE.channels, SHAPE)
    exponents = _load_statistic(saved.exponents, queries, float("inf"), SHAPE)
    delta = _load_statistic(saved.delta, queries, 0.0, SHAPE)
    bias_table = load_bias_table(inputs, queries.number, keys.tokens.number, True, SHAPE)
    scores = scores_of(keys.k, q, keys.tokens, queries, bias_table, inputs, False, SHAPE)
    weights = weights_of(scores, exponents[None, :], inputs, SHAPE)
    applied = weights
    if SHAPE.HAS_ATTN_SCALE:
        share = _load_statistic(saved.share, queries, 0.0, SHAPE)
        applied = (1.0 + inputs.factor) * weights - allowed(keys.tokens, queries) * share[None, :]
    grad_v = add(grad_v, combine(applied, grad_output, SHAPE), SHAPE)
    grad_scores = _score_gradient(weights, inner(keys.v, grad_output, SHAPE), delta[None, :], inputs.factor, SHAPE)
    return add(grad_k, combine(grad_scores, q, SHAPE), SHAPE), grad_v


@triton.jit
def _kv_gradient(
    inputs, saved, grad_output_pointer, grad_q_pointer, grad_k_pointer, grad_v_pointer, grad_pad_token_pointer, start,
    window,
    KEYS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # the gradients of KEYS keys and values from `start` on, through all queries
    FULL: tl.constexpr = SHAPE.tokens if TAIL_M == BLOCK_M else SHAPE.tokens // BLOCK_M * BLOCK_M  # queries in blocks
    tokens = place(start + tl.arange(0, KEYS), window, inputs, True, SHAPE)
    keys = _Keys(tokens, load_projection(inputs, tokens, 1, SHAPE), load_projection(inputs, tokens, 2, SHAPE))
    grad_k, grad_v = zeros(KEYS, SHAPE), zeros(KEYS, SHAPE)
    for query in range(0, FULL, BLOCK_M):
        grad_k, grad_v = _add_kv_gradient(
            grad_k, grad_v, keys, grad_output_pointer, saved, query, window, inputs, BLOCK_M, SHAPE
        )
    if SHAPE.tokens > FULL:
        grad_k, grad_v = _add_kv_gradient(
            grad_k, grad_v, keys, grad_output_pointer, saved, FULL, window, inputs, TAIL_M, SHAPE
        )
    grad_k = times(grad_k, inputs.scale, SHAPE)
    grad_k_pointer, grad_v_pointer = kv_of(grad_q_pointer, grad_k_pointer, grad_v_pointer, SHAPE.FUSED_GRADIENT, SHAPE)
    store_kv_gradient(grad_k_pointer, grad_k, tokens, window, 1, SHAPE)
    store_kv_gradient(grad_v_pointer, grad_v, tokens, window, 2, SHAPE)
    if SHAPE.HAS_PAD_VALUE:
        store_padding_sums(grad_pad_token_pointer, grad_k, tl.program_id(0), 0, tokens, SHAPE)
        store_padding_sums(grad_pad_token_pointer, grad_v, tl.program_id(0), 1, tokens, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_kv_gradient_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    grad_output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    exponents_pointer,  # [B, D, H, W, HEADS], as the next two
    delta_pointer,
    share_pointer,
    grad_q_pointer,  # as the next two in the kernel of single tiles; only if SHAPE.FUSED_GRADIENT, of one map
    grad_k_pointer,
    grad_v_pointer,
    grad_pad_token_pointer,  # [windows, HEADS, blocks of keys, 2, HEAD_DIM]: as in the kernel of single tiles
    depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_N keys, or the last TAIL_N, of one window and head."""
    BLOCKS: tl.constexpr = (SHAPE.keys + BLOCK_N - 1) // BLOCK_N
    FULL: tl.constexpr = BLOCKS if TAIL_N == BLOCK_N else SHAPE.keys // BLOCK_N
    block, head, number = job_of(BLOCKS, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    saved = _QueryStatistics(exponents_pointer + head, delta_pointer + head, share_pointer + head)
    window = locate(number, inputs, SHAPE)
    offset = head * SHAPE.head_dim
    if block < FULL:
        _kv_gradient(
            inputs, saved, grad_output_pointer + offset, grad_q_pointer + offset, grad_k_pointer + offset,
            grad_v_pointer + offset, grad_pad_token_pointer, block * BLOCK_N, window, BLOCK_N, BLOCK_M, TAIL_M, SHAPE,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _kv_gradient(
            inputs, saved, grad_output_pointer + offset, grad_q_pointer + offset, grad_k_pointer + offset,
            grad_v_pointer + offset, grad_pad_token_pointer, FULL * BLOCK_N, window, TAIL_N, BLOCK_M, TAIL_M, SHAPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def window_attention_bias_gradient_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    grad_output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    exponents_pointer,  # [B, D, H, W, HEADS], as the next two
    delta_pointer,
    share_pointer,
    grad_bias_pointer,  # [groups of windows, HEADS, TOKENS, KEYS]
    windows, per_program, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of one head's bias_table, summed over `per_program` windows."""
    DOWN: tl.constexpr = (SHAPE.tokens + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (SHAPE.keys + BLOCK_N - 1) // BLOCK_N
    tile, head, group = job_of(DOWN * ACROSS, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    saved = _QueryStatistics(exponents_pointer + head, delta_pointer + head, share_pointer + head)
    query = tile // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_output_pointer += head * SHAPE.head_dim
    bias_table = load_bias_table(inputs, query, key, False, SHAPE)
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first = group * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        window = locate(number, inputs, SHAPE)
        queries, keys = place(query, window, inputs, False, SHAPE), place(key, window, inputs, True, SHAPE)
        q = load_projection(inputs, queries, 0, SHAPE)
        k = load_projection(inputs, keys, 1, SHAPE)
        v = load_projection(inputs, keys, 2, SHAPE)
        grad_output = load(grad_output_pointer, queries, SHAPE.channels, SHAPE)
        exponents = _load_statistic(saved.exponents, queries, float("inf"), SHAPE)
        delta = _load_statistic(saved.delta, queries, 0.0, SHAPE)
        scores = scores_of(q, k, queries, keys, bias_table, inputs, False, SHAPE)
        weights = weights_of(scores, exponents[:, None], inputs, SHAPE)  # [BLOCK_M, BLOCK_N]
        grad_bias += _score_gradient(weights, inner(grad_output, v, SHAPE), delta[:, None], inputs.factor, SHAPE)
    store_bias_gradient(grad_bias_pointer, grad_bias, tl.cast(group, tl.int64) * SHAPE.heads + head, query, key, SHAPE)
