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
    load_bias_table,
    load_projection,
    scores_of,
    store,
    store_padding_sums,
    times,
)
from .window_attention_tiled import window_attention_tiled_kernel
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
def window_attention_single_tile_kernel(
    qkv_pointer,  # [B, H, W, 3, HEADS, HEAD_DIM]
    pad_token_pointer,  # [3, HEADS, HEAD_DIM]; read only if SHAPE.HAS_PAD_VALUE
    bias_pointer,  # [HEADS, TOKENS, TOKENS]; read only if SHAPE.HAS_BIAS
    attn_scale_pointer,  # [HEADS]; read only if SHAPE.HAS_ATTN_SCALE
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
    grad_pad_token_pointer,  # [windows, HEADS, 2, HEAD_DIM], of k and v: zeros, written where there is padding with values
    grad_attn_scale_pointer,  # [programs per head, HEADS]; written only if SHAPE.HAS_ATTN_SCALE
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


# --------------------------------------------------------------------------- launches


def _arguments(
    qkv: torch.Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: torch.Tensor | None,
    pad_token: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
) -> dict[str, Any]:
    """What all kernels take, by name; any tensor stands for one that is not read."""
    return {
        "qkv_pointer": qkv,
        "pad_token_pointer": qkv if pad_token is None else pad_token.to(qkv.dtype).contiguous(),
        "bias_pointer": qkv if bias is None else bias.contiguous(),
        "attn_scale_pointer": qkv if attn_scale is None else attn_scale.contiguous(),
        "height": qkv.shape[1],
        "width": qkv.shape[2],
        "shift_rows": shift[0],
        "shift_columns": shift[1],
        "scale": scale,
        "SHAPE": shape_of(qkv, num_heads, window, shift, layout, bias, pad_token, attn_scale),
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
    pad_token: torch.Tensor | None,
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
    arguments = _arguments(qkv, num_heads, window, shift, scale, layout, bias, pad_token, attn_scale)
    shape = arguments["SHAPE"]
    windows = _windows(qkv, shape)
    with torch.cuda.device_of(qkv):
        if statistics is None:
            per_program, groups = _grouped(windows, num_heads, 4 * PROGRAMS)
            window_attention_single_tile_kernel[(groups * num_heads,)](
                **arguments, output_pointer=output, windows=windows, per_program=per_program,
                BLOCK=block(shape.tokens), **_tiles("single_tile", qkv, shape),
            )  # fmt: skip
        else:
            tiles = _tiles("tiled", qkv, shape)
            window_attention_tiled_kernel[(windows * num_heads * triton.cdiv(shape.tokens, tiles["BLOCK_M"]),)](
                **arguments, output_pointer=output, largest_pointer=statistics[0], inverse_pointer=statistics[1],
                **tiles,
            )  # fmt: skip
    return output


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # of qkv, bias, pad_token, attn_scale
# grad_bias [groups of windows, heads, tokens, tokens], grad_pad_token [groups, heads, blocks, 2, d] of k and v, grad_attn_scale
# [groups, heads, blocks]: sums over some windows each, float32, empty where nobody asks for them
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _single_tile_backward(arguments: dict[str, Any], qkv: torch.Tensor, shape: Shape, bias_gradient: bool) -> Sums:
    windows = _windows(qkv, shape)
    per_program, groups = _grouped(windows, shape.heads, PROGRAMS)
    new = functools.partial(torch.empty, dtype=torch.float32, device=qkv.device)
    sums = (
        new((groups * bias_gradient, shape.heads, shape.tokens, shape.tokens)),
        new((windows * shape.HAS_PAD_VALUE, shape.heads, 1, 2, shape.head_dim)).zero_(),
        new((groups * shape.HAS_ATTN_SCALE, shape.heads, 1)),
    )
    window_attention_single_tile_backward_kernel[(groups * shape.heads,)](
        **arguments, grad_bias_pointer=sums[0], grad_pad_token_pointer=sums[1], grad_attn_scale_pointer=sums[2],
        windows=windows, per_program=per_program, BLOCK=block(shape.tokens), BIAS_GRADIENT=bias_gradient,
        **_tiles("single_tile_backward", qkv, shape),
    )  # fmt: skip
    return sums


def _tiled_backward(
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
    grad_bias = new((groups * bias_gradient, shape.heads, tokens, tokens))
    grad_pad_token = new((windows * shape.HAS_PAD_VALUE, shape.heads, key_blocks, 2, shape.head_dim)).zero_()
    grad_attn_scale = new((windows * shape.HAS_ATTN_SCALE, shape.heads, query_blocks))
    delta = torch.empty_like(statistics[0])  # [B, H, W, heads], as the next
    share = torch.empty_like(delta) if shape.HAS_ATTN_SCALE else delta
    grad_qkv, arguments = arguments["grad_qkv_pointer"], {k: v for k, v in arguments.items() if k != "grad_qkv_pointer"}
    arguments |= {"largest_pointer": statistics[0], "inverse_pointer": statistics[1]}
    arguments |= {"delta_pointer": delta, "share_pointer": share}
    window_attention_q_gradient_kernel[(windows * shape.heads * query_blocks,)](
        **arguments, output_pointer=output, grad_qkv_pointer=grad_qkv, grad_attn_scale_pointer=grad_attn_scale,
        **tiles["q_gradient"],
    )  # fmt: skip
    window_attention_kv_gradient_kernel[(windows * shape.heads * key_blocks,)](
        **arguments, grad_qkv_pointer=grad_qkv, grad_pad_token_pointer=grad_pad_token, **tiles["kv_gradient"]
    )
    if bias_gradient:
        window_attention_bias_gradient_kernel[(groups * pieces,)](
            **arguments, grad_bias_pointer=grad_bias, windows=windows, per_program=per_program, **tiles["bias_gradient"]
        )
    return grad_bias, grad_pad_token, grad_attn_scale


def _totals(
    sums: Sums,
    nothing: torch.Tensor,
    bias: torch.Tensor | None,
    pad_token: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of bias, padding and attn_scale; copies of `nothing` for those that are None."""
    grad_bias, grad_pad_token, grad_attn_scale = nothing, nothing.clone(), nothing.clone()
    if bias is not None:
        grad_bias = sums[0].sum(0).to(bias.dtype)
    if pad_token is not None:
        of_kv = sums[1].sum((0, 2)).transpose(0, 1)  # [2, heads, d]; nobody looks at q
        grad_pad_token = torch.cat((torch.zeros_like(of_kv[:1]), of_kv)).flatten().to(pad_token.dtype)
    if attn_scale is not None:
        grad_attn_scale = sums[2].sum((0, 2)).to(attn_scale.dtype)
    return grad_bias, grad_pad_token, grad_attn_scale


def window_attention_backward(
    grad_output: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    statistics: torch.Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: torch.Tensor | None,
    pad_token: torch.Tensor | None,
    attn_scale: torch.Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients of qkv and, where `wanted`, of bias, padding and attn_scale; empty elsewhere."""
    qkv, grad_output = qkv.contiguous(), grad_output.contiguous()
    grad_qkv = torch.empty_like(qkv)
    arguments = _arguments(qkv, num_heads, window, shift, scale, layout, bias, pad_token, attn_scale)
    arguments |= {"grad_output_pointer": grad_output, "grad_qkv_pointer": grad_qkv}
    shape = arguments["SHAPE"]
    with torch.cuda.device_of(qkv):
        if statistics is None:
            sums = _single_tile_backward(arguments, qkv, shape, wanted[0])
        else:
            sums = _tiled_backward(arguments, qkv, shape, output.contiguous(), statistics, wanted[0])
    present = zip((bias, pad_token, attn_scale), wanted, strict=True)
    nothing = qkv.new_empty(0)
    return grad_qkv, *_totals(sums, nothing, *(tensor if want else None for tensor, want in present))
