"""Triton kernels of attention in windows that do not fit a tile: blocks of keys with an online softmax (Milakov and
Gimelshein, arXiv 1805.02867), and a backward pass of three kernels (for q; for k and v; for the bias), each of which
finds the weights again, as in FlashAttention-2 (arXiv 2307.08691)."""

from __future__ import annotations

import triton
import triton.language as tl

from .window_tiles import LOG2E, SIZES, dot, finite, load, load_table, place, scores_of, store

# --------------------------------------------------------------------------- forward


@triton.jit
def _attend(
    q, query, q_region, table_pointer, q_pointer, out, largest, total,
    start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the state of an online softmax, `out` [M, D] and `total` [M] relative to `largest` [M], after BLOCK more keys
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    key = start + tl.arange(0, BLOCK)
    index, real, region = place(window, key, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    table = 0.0
    if BIASED:
        table = load_table(table_pointer, query, key, TOKENS, 1, TOKENS)
    scores = scores_of(q, k, table, q_region, tl.where(real, region, -1), scale, BIASED, MASKED, PRECISION)
    larger = tl.maximum(largest, tl.max(scores, 1))
    base = finite(larger) * LOG2E
    shrink = tl.exp2(largest * LOG2E - base)
    weights = tl.exp2(scores * LOG2E - base[:, None])  # [M, BLOCK]
    out = out * shrink[:, None] + dot(weights.to(v.dtype), v, PRECISION)
    return out, larger, total * shrink + tl.sum(weights, 1)


@triton.jit
def _forward_queries(
    q_pointer, table_pointer, output_pointer, largest_pointer, inverse_pointer,
    start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # QUERIES queries from `start` on, through all keys: blocks of BLOCK_N, then one of TAIL_N if they do not divide
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    FULL: tl.constexpr = TOKENS if TAIL_N == BLOCK_N else TOKENS // BLOCK_N * BLOCK_N  # keys in blocks
    CUT: tl.constexpr = MASKED or FULL % BLOCK_N != 0
    query = start + tl.arange(0, QUERIES)
    index, real, region = place(window, query, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    out = tl.zeros([QUERIES, BLOCK_D], dtype=tl.float32)
    largest = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([QUERIES], dtype=tl.float32)
    for key in range(0, FULL, BLOCK_N):
        out, largest, total = _attend(
            q, query, region, table_pointer, q_pointer, out, largest, total,
            key, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_N, BIASED, CUT, PRECISION,
        )  # fmt: skip
    if FULL < TOKENS:
        out, largest, total = _attend(
            q, query, region, table_pointer, q_pointer, out, largest, total,
            FULL, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_N, BIASED, True, PRECISION,
        )  # fmt: skip
    inverse = 1.0 / total
    store(output_pointer, out * inverse[:, None], index, real, CHANNELS, HEAD_DIM, BLOCK_D)
    tl.store(largest_pointer + index * HEADS, largest, mask=real)
    tl.store(inverse_pointer + index * HEADS, inverse, mask=real)


@triton.jit(do_not_specialize=SIZES)
def window_attention_blocked_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if BIASED
    output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    largest_pointer,  # [B, H, W, HEADS], largest score of each query
    inverse_pointer,  # [B, H, W, HEADS], 1 / sum of exp(score - largest)
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_M queries, or the last TAIL_M, of one window and head."""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = BLOCKS if TAIL_M == BLOCK_M else TOKENS // BLOCK_M
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % HEADS
    window = tl.program_id(0) // (BLOCKS * HEADS)
    q_pointer = qkv_pointer + head * HEAD_DIM
    output_pointer += head * HEAD_DIM
    table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
    largest_pointer += head
    inverse_pointer += head
    if block < FULL:
        _forward_queries(
            q_pointer, table_pointer, output_pointer, largest_pointer, inverse_pointer,
            block * BLOCK_M, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_M, BLOCK_N, TAIL_N, BIASED, MASKED, PRECISION,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _forward_queries(
            q_pointer, table_pointer, output_pointer, largest_pointer, inverse_pointer,
            FULL * BLOCK_M, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_M, BLOCK_N, TAIL_N, BIASED, MASKED, PRECISION,
        )  # fmt: skip


# --------------------------------------------------------------------------- backward


@triton.jit
def _statistics(largest_pointer, inverse_pointer, index, real, HEADS: tl.constexpr):
    # largest score, in powers of 2, and 1 / sum of weights; where no query is, values that make every weight 0
    largest = tl.load(largest_pointer + index * HEADS, mask=real, other=float("inf"))
    return largest * LOG2E, tl.load(inverse_pointer + index * HEADS, mask=real, other=0.0)


@triton.jit
def _add_q_gradient(
    q, gradient, query, q_region, largest, inverse, delta, table_pointer, q_pointer, to_q,
    start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # to_q [M, D] after BLOCK more keys
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    key = start + tl.arange(0, BLOCK)
    index, real, region = place(window, key, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    table = 0.0
    if BIASED:
        table = load_table(table_pointer, query, key, TOKENS, 1, TOKENS)
    scores = scores_of(q, k, table, q_region, tl.where(real, region, -1), scale, BIASED, MASKED, PRECISION)
    weights = tl.exp2(scores * LOG2E - largest[:, None]) * inverse[:, None]  # [M, BLOCK]
    to_scores = weights * (dot(gradient, tl.trans(v), PRECISION) - delta[:, None])
    return to_q + dot(to_scores.to(k.dtype), k, PRECISION)


@triton.jit
def _q_gradient(
    q_pointer, table_pointer, output_pointer, gradient_pointer, largest_pointer, inverse_pointer, delta_pointer,
    to_q_pointer, start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # of QUERIES queries from `start` on, through all keys
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    FULL: tl.constexpr = TOKENS if TAIL_N == BLOCK_N else TOKENS // BLOCK_N * BLOCK_N  # keys in blocks
    CUT: tl.constexpr = MASKED or FULL % BLOCK_N != 0
    query = start + tl.arange(0, QUERIES)
    index, real, region = place(window, query, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    gradient = load(gradient_pointer, index, real, CHANNELS, HEAD_DIM, BLOCK_D)
    output = load(output_pointer, index, real, CHANNELS, HEAD_DIM, BLOCK_D)
    largest, inverse = _statistics(largest_pointer, inverse_pointer, index, real, HEADS)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(delta_pointer + index * HEADS, delta, mask=real)
    to_q = tl.zeros([QUERIES, BLOCK_D], dtype=tl.float32)
    for key in range(0, FULL, BLOCK_N):
        to_q = _add_q_gradient(
            q, gradient, query, region, largest, inverse, delta, table_pointer, q_pointer, to_q,
            key, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_N, BIASED, CUT, PRECISION,
        )  # fmt: skip
    if FULL < TOKENS:
        to_q = _add_q_gradient(
            q, gradient, query, region, largest, inverse, delta, table_pointer, q_pointer, to_q,
            FULL, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_N, BIASED, True, PRECISION,
        )  # fmt: skip
    store(to_q_pointer, to_q * scale, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def window_attention_q_gradient_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if BIASED
    output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    gradient_pointer,  # of the output, as it
    largest_pointer,  # [B, H, W, HEADS]
    inverse_pointer,  # [B, H, W, HEADS]
    delta_pointer,  # [B, H, W, HEADS], sum of output * gradient: written, for the other kernels
    to_qkv_pointer,  # as qkv; q's part is written
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_M queries, or the last TAIL_M, of one window and head."""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = BLOCKS if TAIL_M == BLOCK_M else TOKENS // BLOCK_M
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % HEADS
    window = tl.program_id(0) // (BLOCKS * HEADS)
    q_pointer = qkv_pointer + head * HEAD_DIM
    output_pointer += head * HEAD_DIM
    gradient_pointer += head * HEAD_DIM
    to_q_pointer = to_qkv_pointer + head * HEAD_DIM
    table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
    largest_pointer += head
    inverse_pointer += head
    delta_pointer += head
    if block < FULL:
        _q_gradient(
            q_pointer, table_pointer, output_pointer, gradient_pointer, largest_pointer, inverse_pointer,
            delta_pointer, to_q_pointer, block * BLOCK_M, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_M, BLOCK_N, TAIL_N, BIASED, MASKED, PRECISION,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _q_gradient(
            q_pointer, table_pointer, output_pointer, gradient_pointer, largest_pointer, inverse_pointer,
            delta_pointer, to_q_pointer, FULL * BLOCK_M, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_M, BLOCK_N, TAIL_N, BIASED, MASKED, PRECISION,
        )  # fmt: skip


@triton.jit
def _add_kv_gradient(
    k, v, key, k_region, table_pointer, q_pointer, gradient_pointer, largest_pointer, inverse_pointer, delta_pointer,
    to_k, to_v, start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # to_k, to_v [N, D] after BLOCK more queries; scores and weights are transposed, [N, BLOCK]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    query = start + tl.arange(0, BLOCK)
    index, real, region = place(window, query, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    gradient = load(gradient_pointer, index, real, CHANNELS, HEAD_DIM, BLOCK_D)
    largest, inverse = _statistics(largest_pointer, inverse_pointer, index, real, HEADS)
    delta = tl.load(delta_pointer + index * HEADS, mask=real, other=0.0)
    table = 0.0
    if BIASED:
        table = load_table(table_pointer, key, query, 1, TOKENS, TOKENS)
    scores = scores_of(k, q, table, k_region, region, scale, BIASED, MASKED, PRECISION)
    weights = tl.exp2(scores * LOG2E - largest[None, :]) * inverse[None, :]
    to_v += dot(weights.to(q.dtype), gradient, PRECISION)
    to_scores = weights * (dot(v, tl.trans(gradient), PRECISION) - delta[None, :])
    to_k += dot(to_scores.to(q.dtype), q, PRECISION)
    return to_k, to_v


@triton.jit
def _kv_gradient(
    q_pointer, table_pointer, gradient_pointer, largest_pointer, inverse_pointer, delta_pointer, to_q_pointer,
    start, window, height, width, shift_rows, shift_columns, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # of KEYS keys and values from `start` on, through all queries
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    FULL: tl.constexpr = TOKENS if TAIL_M == BLOCK_M else TOKENS // BLOCK_M * BLOCK_M  # queries in blocks
    key = start + tl.arange(0, KEYS)
    index, real, region = place(window, key, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS)
    k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    k_region = tl.where(real, region, -1)
    to_k = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    to_v = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    for query in range(0, FULL, BLOCK_M):
        to_k, to_v = _add_kv_gradient(
            k, v, key, k_region, table_pointer, q_pointer, gradient_pointer, largest_pointer, inverse_pointer,
            delta_pointer, to_k, to_v, query, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_M, BIASED, MASKED, PRECISION,
        )  # fmt: skip
    if FULL < TOKENS:
        to_k, to_v = _add_kv_gradient(
            k, v, key, k_region, table_pointer, q_pointer, gradient_pointer, largest_pointer, inverse_pointer,
            delta_pointer, to_k, to_v, FULL, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_M, BIASED, MASKED, PRECISION,
        )  # fmt: skip
    store(to_q_pointer + CHANNELS, to_k * scale, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    store(to_q_pointer + 2 * CHANNELS, to_v, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def window_attention_kv_gradient_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if BIASED
    gradient_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    largest_pointer,  # [B, H, W, HEADS], as the next two
    inverse_pointer,
    delta_pointer,
    to_qkv_pointer,  # as qkv; the parts of k and v are written
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: BLOCK_N keys, or the last TAIL_N, of one window and head."""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    FULL: tl.constexpr = BLOCKS if TAIL_N == BLOCK_N else TOKENS // BLOCK_N
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(0) // BLOCKS % HEADS
    window = tl.program_id(0) // (BLOCKS * HEADS)
    q_pointer = qkv_pointer + head * HEAD_DIM
    gradient_pointer += head * HEAD_DIM
    to_q_pointer = to_qkv_pointer + head * HEAD_DIM
    table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
    largest_pointer += head
    inverse_pointer += head
    delta_pointer += head
    if block < FULL:
        _kv_gradient(
            q_pointer, table_pointer, gradient_pointer, largest_pointer, inverse_pointer, delta_pointer, to_q_pointer,
            block * BLOCK_N, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, BLOCK_N, BLOCK_M, TAIL_M, BIASED, MASKED, PRECISION,
        )  # fmt: skip
    elif FULL < BLOCKS:
        _kv_gradient(
            q_pointer, table_pointer, gradient_pointer, largest_pointer, inverse_pointer, delta_pointer, to_q_pointer,
            FULL * BLOCK_N, window, height, width, shift_rows, shift_columns, scale,
            HEADS, HEAD_DIM, BLOCK_D, WINDOW_ROWS, WINDOW_COLUMNS, TAIL_N, BLOCK_M, TAIL_M, BIASED, MASKED, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def window_attention_bias_gradient_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]
    gradient_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    largest_pointer,  # [B, H, W, HEADS], as the next two
    inverse_pointer,
    delta_pointer,
    to_bias_pointer,  # [groups of windows, HEADS, TOKENS, TOKENS]
    windows,
    per_program,
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: one tile of one head's table, summed over `per_program` windows. (TAIL_M, TAIL_N: not used.)"""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    DOWN: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    ACROSS: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    query = program // ACROSS % DOWN * BLOCK_M + tl.arange(0, BLOCK_M)
    key = program % ACROSS * BLOCK_N + tl.arange(0, BLOCK_N)
    head = program // (DOWN * ACROSS) % HEADS
    group = program // (DOWN * ACROSS * HEADS)
    q_pointer = qkv_pointer + head * HEAD_DIM
    gradient_pointer += head * HEAD_DIM
    table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
    table = load_table(table_pointer, query, key, TOKENS, 1, TOKENS)
    to_table = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first = group * per_program
    for window in range(first, tl.minimum(first + per_program, windows)):
        index, real, q_region = place(
            window, query, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS
        )
        q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        gradient = load(gradient_pointer, index, real, CHANNELS, HEAD_DIM, BLOCK_D)
        largest, inverse = _statistics(largest_pointer + head, inverse_pointer + head, index, real, HEADS)
        delta = tl.load(delta_pointer + head + index * HEADS, mask=real, other=0.0)
        index, real, k_region = place(
            window, key, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS
        )
        k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        scores = scores_of(q, k, table, q_region, tl.where(real, k_region, -1), scale, BIASED, MASKED, PRECISION)
        weights = tl.exp2(scores * LOG2E - largest[:, None]) * inverse[:, None]  # [BLOCK_M, BLOCK_N]
        to_table += weights * (dot(gradient, tl.trans(v), PRECISION) - delta[:, None])
    start = to_bias_pointer + (tl.cast(group, tl.int64) * HEADS + head) * (TOKENS * TOKENS)
    mask = (query < TOKENS)[:, None] & (key < TOKENS)[None, :]
    tl.store(start + query[:, None] * TOKENS + key[None, :], to_table, mask=mask)
