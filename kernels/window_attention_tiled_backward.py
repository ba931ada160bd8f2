"""Triton kernels of the backward pass of attention in windows that do not fit a tile: for q, k and v in one pass over
the scores, blocks of keys in the outer loop as in FlashAttention-2 (arXiv 2307.08691), and for the bias.

The gradient of q is summed over blocks of keys in memory, in float32, by the program that has the window: no atomics.

With AttnScale, output = (1 + w) Y - w M, the attention's gradient is (1 + w) gradient @ v, and its mean under the
attention is <gradient, output> + w <gradient, M>: nothing is divided by 1 + w.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, Tokens, inputs_of, kv_of, locate, place
from .window_attention_tile_ops import (
    add,
    allowed,
    combine,
    combine_transposed,
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

CHUNK_M = 32  # queries of a program that adds up what chunks of keys gave


class _Kept(NamedTuple):
    """Pointers to what a program keeps about the queries of its window, ROWS of them, those behind the last one too.

    If SHAPE.EXACT weights are not divided by their sums: grad_output and delta are instead, and `share` is multiplied.
    """

    exponents: tl.tensor  # [ROWS], of `_exponents_and_inverse`; infinite where no query is
    delta: tl.tensor  # [ROWS], sum of attention * its gradient, times 1 + w
    region: tl.tensor  # [ROWS], of `Tokens`, the bits of an integer
    share: tl.tensor  # [ROWS], w / number of keys; only if SHAPE.HAS_ATTN_SCALE
    inverse: tl.tensor  # [ROWS], 1 / sum of weights; only if SHAPE.EXACT
    q: tl.tensor  # [ROWS, WIDTH], as the next: rows that can be read fast, whatever head_dim and the map are
    grad_output: tl.tensor
    grad_q: tl.tensor  # [ROWS, WIDTH], float32, the sum over blocks of keys so far


class _Maps(NamedTuple):
    """Pointers to maps [B, D, H, W, HEADS, ..] at a head."""

    output: tl.tensor
    grad_output: tl.tensor
    largest: tl.tensor
    inverse: tl.tensor
    grad_q: tl.tensor
    grad_k: tl.tensor
    grad_v: tl.tensor


@triton.jit
def _statistics_of(pointer, job, ROWS: tl.constexpr):
    # exponents, delta, region, share and inverse of _Kept, of a program's work on one window
    exponents = pointer + tl.cast(job, tl.int64) * (5 * ROWS)
    return exponents, exponents + ROWS, exponents + 2 * ROWS, exponents + 3 * ROWS, exponents + 4 * ROWS


@triton.jit
def _load_rows(pointer, number, are_there, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    # a tile of rows that are WIDTH apart, zeros behind them and where there are none yet
    tile = ()  # type: tuple[object, ...]
    for part in tl.static_range(len(SHAPE.parts)):
        channel = part * SHAPE.parts[0] + tl.arange(0, SHAPE.parts[part])
        elements = pointer + number[:, None] * WIDTH + channel[None, :]
        tile += (tl.load(elements, mask=(channel < WIDTH)[None, :] & are_there, other=0.0),)
    return tile


@triton.jit
def _store_rows(pointer, tile, number, WIDTH: tl.constexpr, SHAPE: tl.constexpr):
    # the reverse
    for part in tl.static_range(len(SHAPE.parts)):
        channel = part * SHAPE.parts[0] + tl.arange(0, SHAPE.parts[part])
        elements = pointer + number[:, None] * WIDTH + channel[None, :]
        tl.store(elements, tile[part], mask=(channel < WIDTH)[None, :])


@triton.jit
def _exponents_and_inverse(maps, row, queries, SHAPE: tl.constexpr):
    # what weights are relative to, and a factor of theirs: unless SHAPE.EXACT it is in the exponents, and 1
    LOG2E: tl.constexpr = 1.4426950408889634
    exponents = tl.load(maps.largest + row, mask=queries.real, other=float("inf"))
    inverse = tl.load(maps.inverse + row, mask=queries.real, other=1.0)
    if not SHAPE.EXACT:
        exponents = exponents * LOG2E - tl.log2(inverse)
        inverse = tl.full(inverse.shape, 1.0, dtype=tl.float32)
    return exponents, inverse


@triton.jit
def _score_gradient(weights, products, delta, factor, SHAPE: tl.constexpr):
    # the gradient of scores from products, gradient @ v
    if SHAPE.HAS_ATTN_SCALE:
        products *= 1.0 + factor
    return weights * (products - delta)


# --------------------------------------------------------------------------- statistics of queries


@triton.jit
def _add_sums(
    sums, queries, q, grad_output, exponents, inverse, start, window, inputs,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # sums [M] after BLOCK more keys: of attention times its gradient, times the products of q and k, and times both
    keys = place(start + tl.arange(0, BLOCK), window, inputs, True, SHAPE)
    k = load_projection(inputs, keys, 1, SHAPE)
    v = load_projection(inputs, keys, 2, SHAPE)
    bias_table = load_bias_table(inputs, queries.number, keys.number, False, SHAPE)
    scores = scores_of(q, k, queries, keys, bias_table, inputs, TAIL, SHAPE)
    weights = weights_of(scores, exponents[:, None], inputs, SHAPE) * inverse[:, None]  # [M, BLOCK]
    grad_weights = inner(grad_output, v, tl.constexpr(SHAPE.precision), SHAPE)
    of_gradients, of_products, of_both = sums
    of_gradients += tl.sum(weights * grad_weights, 1)
    if SHAPE.HAS_HEAD_SCALE:
        weighted = weights * inner(q, k, tl.constexpr(SHAPE.precision), SHAPE)
        of_products += tl.sum(weighted, 1)
        of_both += tl.sum(weighted * grad_weights, 1)
    return of_gradients, of_products, of_both


@triton.jit
def _keep_queries(
    kept, maps, grad_attn_scale_pointer, grad_head_scale_pointer, start, window, inputs,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # of QUERIES queries from `start` on; and what they add to the gradients of the two scales
    number = start + tl.arange(0, QUERIES)
    queries = place(number, window, inputs, False, SHAPE)
    row = (queries.start + queries.index) * SHAPE.heads
    exponents, inverse = _exponents_and_inverse(maps, row, queries, SHAPE)
    grad_output = load(maps.grad_output, queries, SHAPE.channels, SHAPE)
    delta = row_sums(load(maps.output, queries, SHAPE.channels, SHAPE), grad_output, SHAPE)
    of_means = tl.zeros([QUERIES], dtype=tl.float32)  # gradient * mean of values, summed over the channels
    if SHAPE.HAS_ATTN_SCALE:
        means, inverse_counts = mean_values(queries, window, inputs, QUERIES, BLOCK_N, TAIL_N, SHAPE)
        of_means = row_sums(means, grad_output, SHAPE)
        delta += inputs.factor * of_means
        tl.store(kept.share + number, tl.where(queries.real, inputs.factor * inverse_counts / inverse, 0.0))
    q = load_projection(inputs, queries, 0, SHAPE)
    tl.store(kept.exponents + number, exponents)
    if SHAPE.EXACT:
        tl.store(kept.inverse + number, inverse)
    tl.store(kept.delta + number, delta * inverse)
    tl.store(kept.region + number, queries.region.to(tl.float32, bitcast=True))
    _store_rows(kept.q, q, number, WIDTH, SHAPE)
    scaled = times(grad_output, inverse[:, None], SHAPE) if SHAPE.EXACT else grad_output
    _store_rows(kept.grad_output, scaled, number, WIDTH, SHAPE)
    if SHAPE.HAS_ATTN_SCALE or SHAPE.HAS_HEAD_SCALE:
        FULL: tl.constexpr = SHAPE.keys if TAIL_N == BLOCK_N else SHAPE.keys // BLOCK_N * BLOCK_N  # keys in blocks
        zero = tl.zeros([QUERIES], dtype=tl.float32)
        sums = (zero, zero, zero)
        for key in range(0, FULL, BLOCK_N):
            sums = _add_sums(
                sums, queries, q, grad_output, exponents, inverse, key, window, inputs,
                BLOCK_N, FULL % BLOCK_N != 0, SHAPE,
            )  # fmt: skip
        if SHAPE.keys > FULL:
            sums = _add_sums(
                sums, queries, q, grad_output, exponents, inverse, FULL, window, inputs, TAIL_N, True, SHAPE
            )
        if SHAPE.HAS_ATTN_SCALE:
            tl.store(grad_attn_scale_pointer, tl.sum(sums[0] - of_means, 0))
        if SHAPE.HAS_HEAD_SCALE:
            # of sums that nothing was rounded in, as delta and grad_q were: what is left of them is small
            grad_scale = tl.sum(sums[2] - sums[0] * sums[1], 0)
            if SHAPE.HAS_ATTN_SCALE:
                grad_scale *= 1.0 + inputs.factor
            tl.store(grad_head_scale_pointer, grad_scale)


@triton.jit
def _keep_all_queries(
    kept, maps, grad_attn_scale_pointer, grad_head_scale_pointer, job, window, inputs,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, WIDTH: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (SHAPE.tokens + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = BLOCKS if TAIL_M == BLOCK_M else SHAPE.tokens // BLOCK_M
    grad_attn_scale_pointer += job * BLOCKS
    grad_head_scale_pointer += job * BLOCKS
    for block in range(FULL):
        _keep_queries(
            kept, maps, grad_attn_scale_pointer + block, grad_head_scale_pointer + block, block * BLOCK_M, window,
            inputs, BLOCK_M, BLOCK_N, TAIL_N, WIDTH, SHAPE,
        )  # fmt: skip
    if FULL < BLOCKS:
        _keep_queries(
            kept, maps, grad_attn_scale_pointer + FULL, grad_head_scale_pointer + FULL, FULL * BLOCK_M, window, inputs,
            TAIL_M, BLOCK_N, TAIL_N, WIDTH, SHAPE,
        )  # fmt: skip
    tl.debug_barrier()  # what one thread has written others read


# --------------------------------------------------------------------------- q, k, v


class _Keys(NamedTuple):
    """N keys, with all that their gradient is made of."""

    tokens: tl.tensor  # behind the last key that one again, so that its weights are no larger than others
    scored: tl.tensor  # k of these tokens, a tile, as the next
    k: tl.tensor  # zeros behind the last key, as the next
    v: tl.tensor


@triton.jit
def _add_queries(
    grad_k, grad_v, keys, kept, maps, start, window, inputs, is_later,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # grad_k, grad_v, tiles of N keys, after QUERIES more queries, whose gradient gets what these keys add to it
    number = start + tl.arange(0, QUERIES)
    region = tl.load(kept.region + number).to(tl.int32, bitcast=True)
    queries = Tokens(number, number, number, number, number, region)  # as far as scores need them
    q = _load_rows(kept.q, number, True, WIDTH, SHAPE)
    grad_output = _load_rows(kept.grad_output, number, True, WIDTH, SHAPE)
    exponents, delta = tl.load(kept.exponents + number), tl.load(kept.delta + number)
    bias_table = load_bias_table(inputs, number, keys.tokens.number, True, SHAPE)
    # scores and weights are transposed, [N, QUERIES]: so only those of grad_q go through shared memory
    scores = scores_of(keys.scored, q, keys.tokens, queries, bias_table, inputs, False, SHAPE)
    weights = weights_of(scores, exponents[None, :], inputs, SHAPE)
    applied = weights
    if SHAPE.HAS_ATTN_SCALE:
        share = tl.load(kept.share + number)
        applied = (1.0 + inputs.factor) * weights - allowed(keys.tokens, queries) * share[None, :]
    grad_v = add(grad_v, combine(applied, grad_output, SHAPE), SHAPE)
    grad_scores = _score_gradient(
        weights, inner(keys.v, grad_output, tl.constexpr(SHAPE.precision), SHAPE), delta[None, :], inputs.factor, SHAPE
    )
    grad_k = add(grad_k, combine(grad_scores, q, SHAPE), SHAPE)
    before = _load_rows(kept.grad_q, number, is_later, WIDTH, SHAPE)
    grad_q = add(before, combine_transposed(grad_scores, keys.k, SHAPE), SHAPE)
    _store_rows(kept.grad_q, grad_q, number, WIDTH, SHAPE)
    return grad_k, grad_v


@triton.jit
def _add_keys(
    kept, maps, grad_pad_token_pointer, place_of_sums, start, window, inputs, is_later,
    BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # the gradients of BLOCK_N keys and values from `start` on, and what they add to those of all queries
    FULL: tl.constexpr = SHAPE.tokens if TAIL_M == BLOCK_M else SHAPE.tokens // BLOCK_M * BLOCK_M  # queries in blocks
    number = start + tl.arange(0, BLOCK_N)
    tokens = place(number, window, inputs, True, SHAPE)
    k, v = load_projection(inputs, tokens, 1, SHAPE), load_projection(inputs, tokens, 2, SHAPE)
    keys = _Keys(tokens, k, k, v)
    if SHAPE.keys % BLOCK_N != 0 and not SHAPE.MASKED:  # else those behind the last are in no region
        repeated = place(tl.minimum(number, SHAPE.keys - 1), window, inputs, True, SHAPE)
        keys = _Keys(repeated, load_projection(inputs, repeated, 1, SHAPE), k, v)
    grad_k, grad_v = zeros(BLOCK_N, SHAPE), zeros(BLOCK_N, SHAPE)
    for query in range(0, FULL, BLOCK_M):
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, keys, kept, maps, query, window, inputs, is_later,
            BLOCK_M, WIDTH, SHAPE,
        )  # fmt: skip
    if SHAPE.tokens > FULL:
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, keys, kept, maps, FULL, window, inputs, is_later,
            TAIL_M, WIDTH, SHAPE,
        )  # fmt: skip
    grad_k = times(grad_k, inputs.scale, SHAPE)
    store_kv_gradient(maps.grad_k, grad_k, tokens, window, 1, SHAPE)
    store_kv_gradient(maps.grad_v, grad_v, tokens, window, 2, SHAPE)
    if SHAPE.HAS_PAD_VALUE:
        store_padding_sums(grad_pad_token_pointer, grad_k, place_of_sums, 0, tokens, SHAPE)
        store_padding_sums(grad_pad_token_pointer, grad_v, place_of_sums, 1, tokens, SHAPE)
    tl.debug_barrier()  # the next block of keys adds to sums that other threads may have written


@triton.jit
def _store_grad_q(
    sums_pointer, grad_q_pointer, start, chunks, window, inputs,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    # of QUERIES queries from `start` on: the sum over chunks, [chunks, ROWS, WIDTH]
    number = start + tl.arange(0, QUERIES)
    row, grad_q = tl.minimum(number, ROWS - 1), zeros(QUERIES, SHAPE)
    for _ in range(chunks):
        grad_q = add(grad_q, _load_rows(sums_pointer, row, True, WIDTH, SHAPE), SHAPE)
        sums_pointer += ROWS * WIDTH
    grad_q = times(grad_q, inputs.scale, SHAPE)
    store(grad_q_pointer, grad_q, place(number, window, inputs, False, SHAPE), SHAPE.grad_strides[0], SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_tiled_backward_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    grad_output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    statistics_pointer,  # [windows, HEADS, chunks, 5, ROWS], as in _Kept: written
    rows_pointer,  # [programs, 2, ROWS, WIDTH], q and grad_output of a window, as q: written, as the next
    sums_pointer,  # [programs, ROWS, WIDTH], gradients of q; float32
    output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    largest_pointer,  # [B, D, H, W, HEADS]
    inverse_pointer,  # [B, D, H, W, HEADS]
    grad_q_pointer,  # as q, tokens SHAPE.grad_strides apart; that of q is written only if `chunks` is 1
    grad_k_pointer,  # as k, or [windows, KEYS, HEADS, HEAD_DIM] if SHAPE.OVERLAP; only if not SHAPE.FUSED_GRADIENT
    grad_v_pointer,  # as grad_k
    grad_pad_token_pointer,  # [windows, HEADS, blocks of keys, 2, HEAD_DIM]: as in the kernel of single tiles
    grad_attn_scale_pointer,  # [windows, HEADS, blocks of queries]; written only if SHAPE.HAS_ATTN_SCALE
    grad_head_scale_pointer,  # the same, less a factor of `scale`; written only if SHAPE.HAS_HEAD_SCALE
    chunks, blocks, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program: one window and head, or one of its `chunks`: `blocks` blocks of keys, with all queries, whose
    gradients are added up afterwards."""
    KEY_BLOCKS: tl.constexpr = (SHAPE.keys + BLOCK_N - 1) // BLOCK_N
    chunk, head, number = job_of(chunks, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    offset = head * SHAPE.head_dim
    grad_q_pointer += offset
    grad_k_pointer, grad_v_pointer = kv_of(
        grad_q_pointer, grad_k_pointer + offset, grad_v_pointer + offset, SHAPE.FUSED_GRADIENT, SHAPE
    )
    maps = _Maps(
        output_pointer + offset, grad_output_pointer + offset, largest_pointer + head, inverse_pointer + head,
        grad_q_pointer, grad_k_pointer, grad_v_pointer,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)
    rows_pointer += 2 * program
    sums_pointer += program
    first = chunk * blocks
    end = tl.minimum(first + blocks, KEY_BLOCKS)
    window, job = locate(number, inputs, SHAPE), number * SHAPE.heads + head
    statistics = _statistics_of(statistics_pointer, job * chunks + chunk, ROWS)
    kept = _Kept(
        statistics[0], statistics[1], statistics[2], statistics[3], statistics[4], rows_pointer,
        rows_pointer + ROWS * WIDTH, sums_pointer,
    )  # fmt: skip
    _keep_all_queries(
        kept, maps, grad_attn_scale_pointer, grad_head_scale_pointer, job, window, inputs,
        BLOCK_M, TAIL_M, BLOCK_N, TAIL_N, WIDTH, SHAPE,
    )  # fmt: skip
    for key in range(first, end):
        _add_keys(
            kept, maps, grad_pad_token_pointer, job * KEY_BLOCKS + key, key * BLOCK_N, window, inputs,
            key > first, BLOCK_M, TAIL_M, BLOCK_N, WIDTH, SHAPE,
        )  # fmt: skip
    if chunks == 1:
        for query in range(0, SHAPE.tokens, BLOCK_M):
            _store_grad_q(sums_pointer, grad_q_pointer, query, 1, window, inputs, BLOCK_M, ROWS, WIDTH, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_q_gradient_kernel(
    q_pointer,  # this and the next six as above, none is read
    k_pointer,
    v_pointer,
    pad_token_pointer,
    bias_pointer,
    attn_scale_pointer,
    head_scale_pointer,
    sums_pointer,  # [windows, HEADS, chunks, ROWS, WIDTH]
    grad_q_pointer,  # as q, tokens SHAPE.grad_strides apart: written
    chunks, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_M queries of one window and head, summed over the chunks of keys."""
    BLOCKS: tl.constexpr = (SHAPE.tokens + BLOCK_M - 1) // BLOCK_M
    block, head, number = job_of(BLOCKS, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    sums_pointer += tl.cast(number * SHAPE.heads + head, tl.int64) * chunks * (ROWS * WIDTH)
    _store_grad_q(
        sums_pointer, grad_q_pointer + head * SHAPE.head_dim, block * BLOCK_M, chunks, locate(number, inputs, SHAPE),
        inputs, BLOCK_M, ROWS, WIDTH, SHAPE,
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
    statistics_pointer,  # [windows, HEADS, chunks, 5, ROWS], as in _Kept
    grad_bias_pointer,  # [groups of windows, HEADS, TOKENS, KEYS]
    windows, per_program, chunks, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program: one tile of one head's bias_table, summed over `per_program` windows."""
    DOWN: tl.constexpr = (SHAPE.tokens + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (SHAPE.keys + BLOCK_N - 1) // BLOCK_N
    tile, head, group = job_of(DOWN * ACROSS, SHAPE)
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    query = tile // ACROSS * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(query, ROWS - 1)
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
        statistics = _statistics_of(statistics_pointer, (number * SHAPE.heads + head) * chunks, ROWS)
        exponents, delta = tl.load(statistics[0] + row), tl.load(statistics[1] + row)
        scores = scores_of(q, k, queries, keys, bias_table, inputs, False, SHAPE)
        weights = weights_of(scores, exponents[:, None], inputs, SHAPE)  # [BLOCK_M, BLOCK_N]
        grad_weights = inner(grad_output, v, tl.constexpr(SHAPE.precision), SHAPE)
        if SHAPE.EXACT:
            grad_weights *= tl.load(statistics[4] + row)[:, None]
        grad_bias += _score_gradient(weights, grad_weights, delta[:, None], inputs.factor, SHAPE)
    store_bias_gradient(grad_bias_pointer, grad_bias, tl.cast(group, tl.int64) * SHAPE.heads + head, query, key, SHAPE)
