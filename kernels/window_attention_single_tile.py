"""Triton kernels of attention in windows that fit a tile: a program goes through several windows of one head, keeps the
bias and the sum of its gradients in registers, and the backward pass finds everything again from q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, inputs_of, kv_of, locate, place
from .window_attention_tile_ops import (
    allowed,
    combine,
    combine_transposed,
    exponents_of,
    finite,
    inner,
    load,
    load_bias_table,
    load_projection,
    scores_of,
    store,
    store_bias_gradient,
    store_kv_gradient,
    store_padding_sums,
    times,
    weights_of,
)


@triton.jit
def _high_pass(weights, queries, keys, factor):
    # (1 + w) A - w U, and U, of A [BLOCK_M, BLOCK_N]; U is uniform on the keys that a query may attend
    uniform = allowed(queries, keys)
    uniform *= (1.0 / tl.maximum(tl.sum(uniform, 1), 1.0))[:, None]
    return (1.0 + factor) * weights - factor * uniform, uniform


@triton.jit(do_not_specialize=SIZES)
def window_attention_single_tile_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    windows, per_program, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Each program: `per_program` windows of one head."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    output_pointer += head * SHAPE.head_dim
    query, key = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    bias_table = load_bias_table(inputs, query, key, False, SHAPE)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        window = locate(number, inputs, SHAPE)
        queries, keys = place(query, window, inputs, False, SHAPE), place(key, window, inputs, True, SHAPE)
        q = load_projection(inputs, queries, 0, SHAPE)
        k = load_projection(inputs, keys, 1, SHAPE)
        v = load_projection(inputs, keys, 2, SHAPE)
        scores = scores_of(q, k, queries, keys, bias_table, inputs, SHAPE.keys < BLOCK_N, SHAPE)
        largest = finite(exponents_of(tl.max(scores, 1), inputs, SHAPE))
        weights = weights_of(scores, largest[:, None], inputs, SHAPE)  # [BLOCK_M, BLOCK_N]
        inverse = (1.0 / tl.sum(weights, 1))[:, None]
        if SHAPE.HAS_ATTN_SCALE:
            weights, _ = _high_pass(weights * inverse, queries, keys, inputs.factor)
            out = combine(weights, v, SHAPE)
        else:
            out = times(combine(weights, v, SHAPE), inverse, SHAPE)
        store(output_pointer, out, queries, SHAPE.channels, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_single_tile_backward_kernel(
    q_pointer,  # [B, D, H, W, HEADS, HEAD_DIM], tokens SHAPE.strides apart, as the next two
    k_pointer,  # read only if not SHAPE.FUSED, as the next
    v_pointer,
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, KEYS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    head_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_HEAD_SCALE
    grad_output_pointer,  # [B, D, H, W, HEADS, HEAD_DIM]
    grad_q_pointer,  # as q, tokens SHAPE.grad_strides apart
    grad_k_pointer,  # as k, or [windows, KEYS, HEADS, HEAD_DIM] if SHAPE.OVERLAP; only if not SHAPE.FUSED_GRADIENT
    grad_v_pointer,  # as grad_k
    grad_bias_pointer,  # [programs per head, HEADS, TOKENS, KEYS]; written only if BIAS_GRADIENT
    grad_pad_token_pointer,  # [windows, HEADS, 2, HEAD_DIM], of k and v: zeros, written where padding has values
    grad_attn_scale_pointer,  # [programs per head, HEADS]; written only if SHAPE.HAS_ATTN_SCALE
    grad_head_scale_pointer,  # the same, less a factor of `scale`; written only if SHAPE.HAS_HEAD_SCALE
    windows, per_program, depth, shift_planes, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Each program: `per_program` windows of one head, and the sums of their gradients of what windows share."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, q_pointer, k_pointer, v_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer, head_scale_pointer,
        depth, shift_planes, height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    grad_output_pointer += head * SHAPE.head_dim
    offset = head * SHAPE.head_dim
    grad_q_pointer += offset
    grad_k_pointer, grad_v_pointer = kv_of(
        grad_q_pointer, grad_k_pointer + offset, grad_v_pointer + offset, SHAPE.FUSED_GRADIENT, SHAPE
    )
    query, key = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    grad_factor = tl.zeros([BLOCK_M], dtype=tl.float32)
    grad_scale = tl.zeros([BLOCK_M], dtype=tl.float32)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        window = locate(number, inputs, SHAPE)
        queries, keys = place(query, window, inputs, False, SHAPE), place(key, window, inputs, True, SHAPE)
        q = load_projection(inputs, queries, 0, SHAPE)
        k = load_projection(inputs, keys, 1, SHAPE)
        v = load_projection(inputs, keys, 2, SHAPE)
        grad_output = load(grad_output_pointer, queries, SHAPE.channels, SHAPE)
        # again for every window: registers are what limits this kernel
        bias_table = load_bias_table(inputs, query, key, False, SHAPE)
        scores = scores_of(q, k, queries, keys, bias_table, inputs, SHAPE.keys < BLOCK_N, SHAPE)
        largest = finite(exponents_of(tl.max(scores, 1), inputs, SHAPE))
        weights = weights_of(scores, largest[:, None], inputs, SHAPE)  # [BLOCK_M, BLOCK_N]
        weights *= tl.where(queries.real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]
        applied, uniform = weights, weights
        if SHAPE.HAS_ATTN_SCALE:
            applied, uniform = _high_pass(weights, queries, keys, inputs.factor)
        grad_v = combine_transposed(applied, grad_output, SHAPE)
        store_kv_gradient(grad_v_pointer, grad_v, keys, window, 2, SHAPE)
        if SHAPE.HAS_PAD_VALUE:
            store_padding_sums(grad_pad_token_pointer, grad_v, number * SHAPE.heads + head, 1, keys, SHAPE)
        grad_scores = inner(grad_output, v, tl.constexpr(SHAPE.precision), SHAPE)  # of the weights, so far
        means = tl.sum(weights * grad_scores, 1)
        if SHAPE.HAS_ATTN_SCALE:
            grad_factor += means - tl.sum(uniform * grad_scores, 1)
        grad_scores = weights * (grad_scores - means[:, None])
        if SHAPE.HAS_ATTN_SCALE:
            grad_scores *= 1.0 + inputs.factor
        if BIAS_GRADIENT:
            grad_bias += grad_scores
        if SHAPE.HAS_HEAD_SCALE:  # not of grad_q, which is made of rounded scores: what is left of these sums is small
            grad_scale += tl.sum(grad_scores * inner(q, k, tl.constexpr(SHAPE.precision), SHAPE), 1)
        grad_q = combine(grad_scores, k, SHAPE)
        store(grad_q_pointer, times(grad_q, inputs.scale, SHAPE), queries, SHAPE.grad_strides[0], SHAPE)
        grad_k = times(combine_transposed(grad_scores, q, SHAPE), inputs.scale, SHAPE)
        store_kv_gradient(grad_k_pointer, grad_k, keys, window, 1, SHAPE)
        if SHAPE.HAS_PAD_VALUE:
            store_padding_sums(grad_pad_token_pointer, grad_k, number * SHAPE.heads + head, 0, keys, SHAPE)
    if BIAS_GRADIENT:
        store_bias_gradient(grad_bias_pointer, grad_bias, tl.program_id(0), query, key, SHAPE)
    if SHAPE.HAS_ATTN_SCALE:
        tl.store(grad_attn_scale_pointer + tl.program_id(0), tl.sum(grad_factor, 0))
    if SHAPE.HAS_HEAD_SCALE:
        tl.store(grad_head_scale_pointer + tl.program_id(0), tl.sum(grad_scale, 0))
