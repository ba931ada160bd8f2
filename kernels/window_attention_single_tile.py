"""Triton kernels of attention in windows that fit a tile: a program goes through several windows of one head, keeps the
bias and the sum of its gradients in registers, and the backward pass finds everything again from q, k and v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, inputs_of, locate, place
from .window_attention_tile_ops import (
    allowed,
    combine,
    combine_transposed,
    exp,
    finite,
    inner,
    load,
    load_bias_table,
    load_projection,
    scores_of,
    store,
    store_padding_sums,
    times,
)


@triton.jit
def _high_pass(weights, tokens, factor):
    # (1 + w) A - w U, and U, of A [BLOCK, BLOCK]; U is uniform on the keys that a query may attend
    uniform = allowed(tokens, tokens)
    uniform *= (1.0 / tl.maximum(tl.sum(uniform, 1), 1.0))[:, None]
    return (1.0 + factor) * weights - factor * uniform, uniform


@triton.jit(do_not_specialize=SIZES)
def window_attention_single_tile_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    windows, per_program, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program: `per_program` windows of one head."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, qkv_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer,
        height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    output_pointer += head * SHAPE.head_dim
    token = tl.arange(0, BLOCK)
    bias_table = load_bias_table(inputs.bias_table, token, token, SHAPE.tokens, 1, SHAPE)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        tokens = place(token, locate(number, inputs, SHAPE), inputs, SHAPE)
        q = load_projection(inputs, tokens, 0, SHAPE)
        k = load_projection(inputs, tokens, 1, SHAPE)
        v = load_projection(inputs, tokens, 2, SHAPE)
        scores = scores_of(q, k, tokens, tokens, bias_table, scale, SHAPE.tokens < BLOCK, SHAPE)
        largest = finite(tl.max(scores, 1))
        weights = exp(scores - largest[:, None])  # [BLOCK, BLOCK]
        inverse = (1.0 / tl.sum(weights, 1))[:, None]
        if SHAPE.HAS_ATTN_SCALE:
            weights, _ = _high_pass(weights * inverse, tokens, inputs.factor)
            out = combine(weights, v, SHAPE)
        else:
            out = times(combine(weights, v, SHAPE), inverse, SHAPE)
        store(output_pointer, out, tokens, SHAPE.channels, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_single_tile_backward_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
    grad_output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    grad_qkv_pointer,  # as qkv
    grad_bias_pointer,  # [programs per head, HEADS, TOKENS, TOKENS]; written only if BIAS_GRADIENT
    grad_pad_token_pointer,  # [windows, HEADS, 2, HEAD_DIM], of k and v: zeros, written where padding has values
    grad_attn_scale_pointer,  # [programs per head, HEADS]; written only if SHAPE.HAS_ATTN_SCALE
    windows, per_program, height, width, shift_rows, shift_columns, scale,
    SHAPE: tl.constexpr, BLOCK: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Each program: `per_program` windows of one head, and the sums of their gradients of what windows share."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, qkv_pointer, pad_token_pointer, bias_pointer, attn_scale_pointer,
        height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    grad_output_pointer += head * SHAPE.head_dim
    grad_q_pointer = grad_qkv_pointer + head * SHAPE.head_dim
    token = tl.arange(0, BLOCK)
    grad_bias = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    grad_factor = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        tokens = place(token, locate(number, inputs, SHAPE), inputs, SHAPE)
        q = load_projection(inputs, tokens, 0, SHAPE)
        k = load_projection(inputs, tokens, 1, SHAPE)
        v = load_projection(inputs, tokens, 2, SHAPE)
        grad_output = load(grad_output_pointer, tokens, SHAPE.channels, SHAPE)
        # again for every window: registers are what limits this kernel
        bias_table = load_bias_table(inputs.bias_table, token, token, SHAPE.tokens, 1, SHAPE)
        scores = scores_of(q, k, tokens, tokens, bias_table, scale, SHAPE.tokens < BLOCK, SHAPE)
        largest = finite(tl.max(scores, 1))
        weights = exp(scores - largest[:, None])  # [BLOCK, BLOCK]
        weights *= tl.where(tokens.real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]
        grad_scores = inner(grad_output, v, SHAPE)  # of the weights, so far
        means = tl.sum(weights * grad_scores, 1)
        applied = weights
        if SHAPE.HAS_ATTN_SCALE:
            applied, uniform = _high_pass(weights, tokens, inputs.factor)
            grad_factor += means - tl.sum(uniform * grad_scores, 1)
        grad_v = combine_transposed(applied, grad_output, SHAPE)
        store(grad_q_pointer + 2 * SHAPE.channels, grad_v, tokens, 3 * SHAPE.channels, SHAPE)
        if SHAPE.HAS_PAD_VALUE:
            store_padding_sums(grad_pad_token_pointer, grad_v, number * SHAPE.heads + head, 1, tokens, SHAPE)
        grad_scores = weights * (grad_scores - means[:, None])
        if SHAPE.HAS_ATTN_SCALE:
            grad_scores *= 1.0 + inputs.factor
        if BIAS_GRADIENT:
            grad_bias += grad_scores
        grad_q = times(combine(grad_scores, k, SHAPE), scale, SHAPE)
        store(grad_q_pointer, grad_q, tokens, 3 * SHAPE.channels, SHAPE)
        grad_k = times(combine_transposed(grad_scores, q, SHAPE), scale, SHAPE)
        store(grad_q_pointer + SHAPE.channels, grad_k, tokens, 3 * SHAPE.channels, SHAPE)
        if SHAPE.HAS_PAD_VALUE:
            store_padding_sums(grad_pad_token_pointer, grad_k, number * SHAPE.heads + head, 0, tokens, SHAPE)
    if BIAS_GRADIENT:
        start = grad_bias_pointer + tl.cast(tl.program_id(0), tl.int64) * (SHAPE.tokens * SHAPE.tokens)
        mask = (token < SHAPE.tokens)[:, None] & (token < SHAPE.tokens)[None, :]
        tl.store(start + token[:, None] * SHAPE.tokens + token[None, :], grad_bias, mask=mask)
    if SHAPE.HAS_ATTN_SCALE:
        tl.store(grad_attn_scale_pointer + tl.program_id(0), tl.sum(grad_factor, 0))
