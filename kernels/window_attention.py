"""Triton kernels of windowed attention: q, k, v are read where the fused projection left them, and so are gradients
written. Window, shift and padding are index arithmetic.

A window that fits a tile: a program goes through several windows of one head, keeps the bias and the sum of its
gradients in registers, and the backward pass finds everything again from q, k and v. Larger windows:
window_attention_large.py. No float atomics: sums have an order that only shapes decide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import block, choose, family_of
from .window_attention_large import (
    window_attention_bias_gradient_kernel,
    window_attention_blocked_kernel,
    window_attention_kv_gradient_kernel,
    window_attention_q_gradient_kernel,
)
from .window_tiles import LOG2E, SIZES, dot, finite, load, load_table, place, scores_of, store

PROGRAMS = 1024  # that work is cut into where each goes through several windows: a few for every multiprocessor

# --------------------------------------------------------------------------- windows that fit a tile


@triton.jit(do_not_specialize=SIZES)
def window_attention_whole_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if BIASED
    output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
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
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: `per_program` windows of one head."""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * per_program
    token = tl.arange(0, BLOCK)
    q_pointer = qkv_pointer + head * HEAD_DIM
    table = 0.0
    if BIASED:
        table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
        table = load_table(table_pointer, token, token, TOKENS, 1, TOKENS)
    for window in range(first, tl.minimum(first + per_program, windows)):
        index, real, region = place(
            window, token, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS
        )
        q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        scores = scores_of(q, k, table, region, tl.where(real, region, -1), scale, BIASED, MASKED, PRECISION)
        largest = finite(tl.max(scores, 1))
        weights = tl.exp2(scores * LOG2E - (largest * LOG2E)[:, None])  # [BLOCK, BLOCK]
        out = dot(weights.to(v.dtype), v, PRECISION) * (1.0 / tl.sum(weights, 1))[:, None]
        store(output_pointer + head * HEAD_DIM, out, index, real, CHANNELS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def window_attention_whole_backward_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if BIASED
    gradient_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    to_qkv_pointer,  # as qkv
    to_bias_pointer,  # [programs per head, HEADS, TOKENS, TOKENS]; written only if BIAS_GRADIENT
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
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program: `per_program` windows of one head, and the sum of their gradients of the bias."""
    TOKENS: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * per_program
    token = tl.arange(0, BLOCK)
    q_pointer = qkv_pointer + head * HEAD_DIM
    to_q_pointer = to_qkv_pointer + head * HEAD_DIM
    table_pointer = bias_pointer + tl.cast(head, tl.int64) * (TOKENS * TOKENS)
    to_table = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for window in range(first, tl.minimum(first + per_program, windows)):
        index, real, region = place(
            window, token, height, width, shift_rows, shift_columns, WINDOW_ROWS, WINDOW_COLUMNS
        )
        q = load(q_pointer, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        k = load(q_pointer + CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        v = load(q_pointer + 2 * CHANNELS, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        gradient = load(gradient_pointer + head * HEAD_DIM, index, real, CHANNELS, HEAD_DIM, BLOCK_D)
        table = 0.0
        if BIASED:  # again for every window: registers are what limits this kernel
            table = load_table(table_pointer, token, token, TOKENS, 1, TOKENS)
        scores = scores_of(q, k, table, region, tl.where(real, region, -1), scale, BIASED, MASKED, PRECISION)
        largest = finite(tl.max(scores, 1))
        weights = tl.exp2(scores * LOG2E - (largest * LOG2E)[:, None])  # [BLOCK, BLOCK]
        weights *= tl.where(real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]
        to_v = dot(tl.trans(weights.to(q.dtype)), gradient, PRECISION)
        store(to_q_pointer + 2 * CHANNELS, to_v, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        to_scores = dot(gradient, tl.trans(v), PRECISION)  # of the weights, so far
        to_scores = weights * (to_scores - tl.sum(weights * to_scores, 1)[:, None])
        if BIAS_GRADIENT:
            to_table += to_scores
        low = to_scores.to(q.dtype)
        to_q = dot(low, k, PRECISION) * scale
        store(to_q_pointer, to_q, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        to_k = dot(tl.trans(low), q, PRECISION) * scale
        store(to_q_pointer + CHANNELS, to_k, index, real, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
    if BIAS_GRADIENT:
        start = to_bias_pointer + tl.cast(tl.program_id(0), tl.int64) * (TOKENS * TOKENS)
        mask = (token < TOKENS)[:, None] & (token < TOKENS)[None, :]
        tl.store(start + token[:, None] * TOKENS + token[None, :], to_table, mask=mask)


# --------------------------------------------------------------------------- launches


def _precision(x: torch.Tensor) -> str:
    """Of float32 products: three TF32 products have float32's accuracy; one, if torch's own matmul may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _shared_arguments(
    qkv: torch.Tensor, num_heads: int, window: list[int], shift: list[int], bias: torch.Tensor | None, scale: float
) -> dict[str, Any]:
    """What all kernels take, by name."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    return {
        "windows": batch * triton.cdiv(height, window[0]) * triton.cdiv(width, window[1]),
        "height": height,
        "width": width,
        "shift_rows": shift[0],
        "shift_columns": shift[1],
        "scale": scale,
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block(head_dim),
        "WINDOW_ROWS": window[0],
        "WINDOW_COLUMNS": window[1],
        "BIASED": bias is not None,
        "MASKED": any(shift) or height % window[0] != 0 or width % window[1] != 0,
        "PRECISION": _precision(qkv),
    }


def _grouped(windows: int, heads: int, programs: int) -> tuple[int, int]:
    """Windows per program, and programs per head, for about `programs` programs."""
    per_program = max(1, triton.cdiv(windows * heads, programs))
    return per_program, triton.cdiv(windows, per_program)


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: torch.Tensor | None,
    scale: float,
    statistics: torch.Tensor | None,
) -> torch.Tensor:
    """Attention inside windows on a GPU: qkv [B, H, W, 3*heads*head_dim], float32, float16 or bfloat16.

    bias [heads, tokens, tokens] is of any floating dtype; statistics [2, B, H, W, heads], float32, is filled with the
    largest score of each query and 1 / sum of its weights. Without it each window is one tile.
    """
    qkv, tokens = qkv.contiguous(), window[0] * window[1]
    output = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)  # [B, H, W, heads*d]
    if qkv.numel() == 0:
        return output
    table = qkv if bias is None else bias.contiguous()
    shared = _shared_arguments(qkv, num_heads, window, shift, bias, scale)
    shape = (family_of(qkv.device), tokens, shared["HEAD_DIM"], 8 * qkv.element_size())
    with torch.cuda.device_of(qkv):
        if statistics is None:
            per_program, groups = _grouped(shared["windows"], num_heads, 4 * PROGRAMS)
            shared["MASKED"] |= tokens < block(tokens)
            window_attention_whole_kernel[(groups * num_heads,)](
                qkv, table, output, per_program=per_program, BLOCK=block(tokens), **shared, **choose("whole", *shape)
            )
        else:
            tiles = choose("blocked", *shape)
            programs = shared.pop("windows") * num_heads * triton.cdiv(tokens, tiles["BLOCK_M"])
            window_attention_blocked_kernel[(programs,)](
                qkv, table, output, statistics[0], statistics[1], **shared, **tiles
            )
    return output


def window_attention_backward(
    gradient: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: torch.Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv [B, H, W, 3*heads*head_dim] and, if asked for, of bias [heads, tokens, tokens] (else empty)."""
    qkv, gradient, tokens = qkv.contiguous(), gradient.contiguous(), window[0] * window[1]
    to_qkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return to_qkv, torch.zeros_like(bias) if bias is not None and bias_gradient else qkv.new_empty(0)
    table = qkv if bias is None else bias.contiguous()
    shared = _shared_arguments(qkv, num_heads, window, shift, bias, scale)
    windows = shared["windows"]
    shape = (family_of(qkv.device), tokens, shared["HEAD_DIM"], 8 * qkv.element_size())
    parts = qkv.new_empty(0, dtype=torch.float32)  # [groups of windows, heads, tokens, tokens]
    with torch.cuda.device_of(qkv):
        if statistics is None:
            per_program, groups = _grouped(windows, num_heads, PROGRAMS)
            if bias_gradient:
                parts = parts.new_empty(groups, num_heads, tokens, tokens)
            shared["MASKED"] |= tokens < block(tokens)
            window_attention_whole_backward_kernel[(groups * num_heads,)](
                qkv, table, gradient, to_qkv, parts, per_program=per_program, BLOCK=block(tokens),
                BIAS_GRADIENT=bias_gradient, **shared, **choose("whole_backward", *shape),
            )  # fmt: skip
        else:
            del shared["windows"]
            kept = (statistics[0], statistics[1], torch.empty_like(statistics[0]))  # each [B, H, W, heads]
            tiles = choose("q_gradient", *shape)
            window_attention_q_gradient_kernel[(windows * num_heads * triton.cdiv(tokens, tiles["BLOCK_M"]),)](
                qkv, table, output.contiguous(), gradient, *kept, to_qkv, **shared, **tiles
            )
            tiles = choose("kv_gradient", *shape)
            window_attention_kv_gradient_kernel[(windows * num_heads * triton.cdiv(tokens, tiles["BLOCK_N"]),)](
                qkv, table, gradient, *kept, to_qkv, **shared, **tiles
            )
            if bias_gradient:
                tiles = choose("bias_gradient", *shape)
                pieces = triton.cdiv(tokens, tiles["BLOCK_M"]) * triton.cdiv(tokens, tiles["BLOCK_N"]) * num_heads
                per_program, groups = _grouped(windows, pieces, PROGRAMS)
                parts = parts.new_empty(groups, num_heads, tokens, tokens)
                window_attention_bias_gradient_kernel[(groups * pieces,)](
                    qkv, table, gradient, *kept, parts, windows, per_program, **shared, **tiles
                )
    if bias is None or not bias_gradient:
        return to_qkv, qkv.new_empty(0)
    return to_qkv, parts.sum(0).to(bias.dtype)
