"""Triton kernels of windowed attention: q, k, v are read where the fused projection left them, and so are gradients
written. Window, shift and padding are index arithmetic.

A window that fits a tile: a program goes through several windows of one head, keeps the bias and the sum of its
gradients in registers, and the backward pass finds everything again from q, k and v. Larger windows:
window_attention_tiled.py. No float atomics: sums have an order that only shapes decide.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .tile_table import block, choose, family_of
from .window_attention_geometry import SIZES, Shape, inputs_of, locate, place, shape_of
from .window_attention_tile_ops import (
    allowed,
    combine,
    combine_transposed,
    exp,
    finite,
    inner,
    load,
    load_projection,
    load_table,
    scores_of,
    store,
    store_padding_sums,
    times,
)
from .window_attention_tiled import window_attention_blocked_kernel
from .window_attention_tiled_backward import (
    window_attention_bias_gradient_kernel,
    window_attention_kv_gradient_kernel,
    window_attention_q_gradient_kernel,
)

PROGRAMS = 1024  # that work is cut into where each goes through several windows: a few for every multiprocessor

# --------------------------------------------------------------------------- windows that fit a tile


@triton.jit
def _high_pass(weights, tokens, factor):
    # (1 + w) A - w U, and U, of A [BLOCK, BLOCK]; U is uniform on the keys that a query may attend
    uniform = allowed(tokens, tokens)
    uniform *= (1.0 / tl.maximum(tl.sum(uniform, 1), 1.0))[:, None]
    return (1.0 + factor) * weights - factor * uniform, uniform


@triton.jit(do_not_specialize=SIZES)
def window_attention_whole_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    padding_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.filled
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if SHAPE.biased
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.scaled
    output_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    windows,
    per_program,
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: `per_program` windows of one head."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, qkv_pointer, padding_pointer, bias_pointer, attn_scale_pointer,
        height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    output_pointer += head * SHAPE.head_dim
    token = tl.arange(0, BLOCK)
    table = load_table(inputs.table, token, token, SHAPE.tokens, 1, SHAPE)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        tokens = place(token, locate(number, inputs, SHAPE), inputs, SHAPE)
        q = load_projection(inputs, tokens, 0, SHAPE)
        k = load_projection(inputs, tokens, 1, SHAPE)
        v = load_projection(inputs, tokens, 2, SHAPE)
        scores = scores_of(q, k, tokens, tokens, table, scale, SHAPE.tokens < BLOCK, SHAPE)
        largest = finite(tl.max(scores, 1))
        weights = exp(scores - largest[:, None])  # [BLOCK, BLOCK]
        inverse = (1.0 / tl.sum(weights, 1))[:, None]
        if SHAPE.scaled:
            weights, _ = _high_pass(weights * inverse, tokens, inputs.factor)
            out = combine(weights, v, SHAPE)
        else:
            out = times(combine(weights, v, SHAPE), inverse, SHAPE)
        store(output_pointer, out, tokens, SHAPE.channels, SHAPE)


@triton.jit(do_not_specialize=SIZES)
def window_attention_whole_backward_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    padding_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.filled
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if SHAPE.biased
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.scaled
    gradient_pointer,  # [B, H, W, HEADS, HEAD_DIM]
    to_qkv_pointer,  # as qkv
    to_bias_pointer,  # [programs per head, HEADS, TOKENS, TOKENS]; written only if BIAS_GRADIENT
    to_padding_pointer,  # [windows, HEADS, 2, HEAD_DIM], of k and v: zeros, written where there is padding with values
    to_attn_scale_pointer,  # [programs per head, HEADS]; written only if SHAPE.scaled
    windows,
    per_program,
    height,
    width,
    shift_rows,
    shift_columns,
    scale,
    SHAPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
):
    """Each program: `per_program` windows of one head, and the sums of their gradients of what windows share."""
    head = tl.program_id(0) % SHAPE.heads
    inputs = inputs_of(
        head, qkv_pointer, padding_pointer, bias_pointer, attn_scale_pointer,
        height, width, shift_rows, shift_columns, scale, SHAPE,
    )  # fmt: skip
    gradient_pointer += head * SHAPE.head_dim
    to_q_pointer = to_qkv_pointer + head * SHAPE.head_dim
    token = tl.arange(0, BLOCK)
    to_table = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    to_factor = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.program_id(0) // SHAPE.heads * per_program
    for number in range(first, tl.minimum(first + per_program, windows)):
        tokens = place(token, locate(number, inputs, SHAPE), inputs, SHAPE)
        q = load_projection(inputs, tokens, 0, SHAPE)
        k = load_projection(inputs, tokens, 1, SHAPE)
        v = load_projection(inputs, tokens, 2, SHAPE)
        gradient = load(gradient_pointer, tokens, SHAPE.channels, SHAPE)
        # again for every window: registers are what limits this kernel
        table = load_table(inputs.table, token, token, SHAPE.tokens, 1, SHAPE)
        scores = scores_of(q, k, tokens, tokens, table, scale, SHAPE.tokens < BLOCK, SHAPE)
        largest = finite(tl.max(scores, 1))
        weights = exp(scores - largest[:, None])  # [BLOCK, BLOCK]
        weights *= tl.where(tokens.real, 1.0 / tl.sum(weights, 1), 0.0)[:, None]
        to_scores = inner(gradient, v, SHAPE)  # of the weights, so far
        means = tl.sum(weights * to_scores, 1)
        applied = weights
        if SHAPE.scaled:
            applied, uniform = _high_pass(weights, tokens, inputs.factor)
            to_factor += means - tl.sum(uniform * to_scores, 1)
        to_v = combine_transposed(applied, gradient, SHAPE)
        store(to_q_pointer + 2 * SHAPE.channels, to_v, tokens, 3 * SHAPE.channels, SHAPE)
        if SHAPE.filled:
            store_padding_sums(to_padding_pointer, to_v, number * SHAPE.heads + head, 1, tokens, SHAPE)
        to_scores = weights * (to_scores - means[:, None])
        if SHAPE.scaled:
            to_scores *= 1.0 + inputs.factor
        if BIAS_GRADIENT:
            to_table += to_scores
        to_q = times(combine(to_scores, k, SHAPE), scale, SHAPE)
        store(to_q_pointer, to_q, tokens, 3 * SHAPE.channels, SHAPE)
        to_k = times(combine_transposed(to_scores, q, SHAPE), scale, SHAPE)
        store(to_q_pointer + SHAPE.channels, to_k, tokens, 3 * SHAPE.channels, SHAPE)
        if SHAPE.filled:
            store_padding_sums(to_padding_pointer, to_k, number * SHAPE.heads + head, 0, tokens, SHAPE)
    if BIAS_GRADIENT:
        start = to_bias_pointer + tl.cast(tl.program_id(0), tl.int64) * (SHAPE.tokens * SHAPE.tokens)
        mask = (token < SHAPE.tokens)[:, None] & (token < SHAPE.tokens)[None, :]
        tl.store(start + token[:, None] * SHAPE.tokens + token[None, :], to_table, mask=mask)
    if SHAPE.scaled:
        tl.store(to_attn_scale_pointer + tl.program_id(0), tl.sum(to_factor, 0))


# --------------------------------------------------------------------------- launches


def _arguments(
    qkv: torch.Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """What all kernels take, by name; any tensor stands for one that is not read."""
    return {
        "qkv_pointer": qkv,
        "padding_pointer": qkv if padding is None else padding.to(qkv.dtype).contiguous(),
        "bias_pointer": qkv if bias is None else bias.contiguous(),
        "attn_scale_pointer": qkv if attn_scale is None else attn_scale.contiguous(),
        "height": qkv.shape[1],
        "width": qkv.shape[2],
        "shift_rows": shift[0],
        "shift_columns": shift[1],
        "scale": scale,
        "SHAPE": shape_of(qkv, num_heads, window, shift, layout, bias, padding, attn_scale),
    }


def _windows(qkv: torch.Tensor, shape: Shape) -> int:
    return qkv.shape[0] * triton.cdiv(qkv.shape[1], shape.rows) * triton.cdiv(qkv.shape[2], shape.columns)


def _tiles(kernel: str, qkv: torch.Tensor, shape: Shape) -> dict[str, Any]:
    return choose(kernel, family_of(qkv.device), shape.tokens, shape.head_dim, 8 * qkv.element_size())


def _grouped(windows: int, pieces: int, programs: int) -> tuple[int, int]:
    """Windows per program, and programs per piece of work in each window, for about `programs` programs."""
    per_program = max(1, triton.cdiv(windows * pieces, programs))
    return per_program, triton.cdiv(windows, per_program)


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
    statistics: torch.Tensor | None,
) -> torch.Tensor:
    """Attention inside windows on a GPU: qkv [B, H, W, 3*heads*head_dim], float32, float16 or bfloat16.

    bias [heads, tokens, tokens], padding [3*heads*head_dim] and attn_scale [heads] are of any floating dtype.
    statistics [2, B, H, W, heads], float32, is filled with the largest score of each query and 1 / sum of its weights;
    without it each window is one tile.
    """
    qkv = qkv.contiguous()
    output = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)  # [B, H, W, heads*d]
    if qkv.numel() == 0:
        return output
    arguments = _arguments(qkv, num_heads, window, shift, scale, layout, bias, padding, attn_scale)
    shape = arguments["SHAPE"]
    windows = _windows(qkv, shape)
    with torch.cuda.device_of(qkv):
        if statistics is None:
            per_program, groups = _grouped(windows, num_heads, 4 * PROGRAMS)
            window_attention_whole_kernel[(groups * num_heads,)](
                **arguments, output_pointer=output, windows=windows, per_program=per_program,
                BLOCK=block(shape.tokens), **_tiles("whole", qkv, shape),
            )  # fmt: skip
        else:
            tiles = _tiles("blocked", qkv, shape)
            window_attention_blocked_kernel[(windows * num_heads * triton.cdiv(shape.tokens, tiles["BLOCK_M"]),)](
                **arguments, output_pointer=output, largest_pointer=statistics[0], inverse_pointer=statistics[1],
                **tiles,
            )  # fmt: skip
    return output


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # of qkv, bias, padding, attn_scale
# to_bias [groups of windows, heads, tokens, tokens], to_padding [groups, heads, blocks, 2, d] of k and v, to_attn_scale
# [groups, heads, blocks]: sums over some windows each, float32, empty where nobody asks for them
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _whole_backward(arguments: dict[str, Any], qkv: torch.Tensor, shape: Shape, bias_gradient: bool) -> Sums:
    windows = _windows(qkv, shape)
    per_program, groups = _grouped(windows, shape.heads, PROGRAMS)
    new = functools.partial(torch.empty, dtype=torch.float32, device=qkv.device)
    sums = (
        new((groups * bias_gradient, shape.heads, shape.tokens, shape.tokens)),
        new((windows * shape.filled, shape.heads, 1, 2, shape.head_dim)).zero_(),
        new((groups * shape.scaled, shape.heads, 1)),
    )
    window_attention_whole_backward_kernel[(groups * shape.heads,)](
        **arguments, to_bias_pointer=sums[0], to_padding_pointer=sums[1], to_attn_scale_pointer=sums[2],
        windows=windows, per_program=per_program, BLOCK=block(shape.tokens), BIAS_GRADIENT=bias_gradient,
        **_tiles("whole_backward", qkv, shape),
    )  # fmt: skip
    return sums


def _large_backward(
    arguments: dict[str, Any],
    qkv: torch.Tensor,
    shape: Shape,
    output: torch.Tensor,
    statistics: torch.Tensor,
    bias_gradient: bool,
) -> Sums:
    tiles = {name: _tiles(name, qkv, shape) for name in ("q_gradient", "kv_gradient", "bias_gradient")}
    windows, tokens = _windows(qkv, shape), shape.tokens
    query_blocks = triton.cdiv(tokens, tiles["q_gradient"]["BLOCK_M"])
    key_blocks = triton.cdiv(tokens, tiles["kv_gradient"]["BLOCK_N"])
    pieces = triton.cdiv(tokens, tiles["bias_gradient"]["BLOCK_M"]) * shape.heads
    pieces *= triton.cdiv(tokens, tiles["bias_gradient"]["BLOCK_N"])
    per_program, groups = _grouped(windows, pieces, PROGRAMS)
    new = functools.partial(torch.empty, dtype=torch.float32, device=qkv.device)
    to_bias = new((groups * bias_gradient, shape.heads, tokens, tokens))
    to_padding = new((windows * shape.filled, shape.heads, key_blocks, 2, shape.head_dim)).zero_()
    to_attn_scale = new((windows * shape.scaled, shape.heads, query_blocks))
    delta = torch.empty_like(statistics[0])  # [B, H, W, heads], as the next
    share = torch.empty_like(delta) if shape.scaled else delta
    to_qkv, arguments = arguments["to_qkv_pointer"], {k: v for k, v in arguments.items() if k != "to_qkv_pointer"}
    arguments |= {"largest_pointer": statistics[0], "inverse_pointer": statistics[1]}
    arguments |= {"delta_pointer": delta, "share_pointer": share}
    window_attention_q_gradient_kernel[(windows * shape.heads * query_blocks,)](
        **arguments, output_pointer=output, to_qkv_pointer=to_qkv, to_attn_scale_pointer=to_attn_scale,
        **tiles["q_gradient"],
    )  # fmt: skip
    window_attention_kv_gradient_kernel[(windows * shape.heads * key_blocks,)](
        **arguments, to_qkv_pointer=to_qkv, to_padding_pointer=to_padding, **tiles["kv_gradient"]
    )
    if bias_gradient:
        window_attention_bias_gradient_kernel[(groups * pieces,)](
            **arguments, to_bias_pointer=to_bias, windows=windows, per_program=per_program, **tiles["bias_gradient"]
        )
    return to_bias, to_padding, to_attn_scale


def _totals(
    sums: Sums,
    nothing: torch.Tensor,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of bias, padding and attn_scale; copies of `nothing` for those that are None."""
    to_bias, to_padding, to_attn_scale = nothing, nothing.clone(), nothing.clone()
    if bias is not None:
        to_bias = sums[0].sum(0).to(bias.dtype)
    if padding is not None:
        of_kv = sums[1].sum((0, 2)).transpose(0, 1)  # [2, heads, d]; nobody looks at q
        to_padding = torch.cat((torch.zeros_like(of_kv[:1]), of_kv)).flatten().to(padding.dtype)
    if attn_scale is not None:
        to_attn_scale = sums[2].sum((0, 2)).to(attn_scale.dtype)
    return to_bias, to_padding, to_attn_scale


def window_attention_backward(
    gradient: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients of qkv and, where `wanted`, of bias, padding and attn_scale; empty elsewhere."""
    qkv, gradient = qkv.contiguous(), gradient.contiguous()
    to_qkv = torch.empty_like(qkv)
    arguments = _arguments(qkv, num_heads, window, shift, scale, layout, bias, padding, attn_scale)
    arguments |= {"gradient_pointer": gradient, "to_qkv_pointer": to_qkv}
    shape = arguments["SHAPE"]
    with torch.cuda.device_of(qkv):
        if statistics is None:
            sums = _whole_backward(arguments, qkv, shape, wanted[0])
        else:
            sums = _large_backward(arguments, qkv, shape, output.contiguous(), statistics, wanted[0])
    present = zip((bias, padding, attn_scale), wanted, strict=True)
    nothing = qkv.new_empty(0)
    return to_qkv, *_totals(sums, nothing, *(tensor if want else None for tensor, want in present))
