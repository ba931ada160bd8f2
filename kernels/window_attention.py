"""Windowed attention on a GPU: q, k, v are read where the fused projection left them, and so are gradients written.
Window, shift and padding are index arithmetic.

Kernels: window_attention_single_tile.py for windows that fit a tile, window_attention_tiled.py and its backward for
larger ones. No float atomics: sums have an order that only shapes decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .dot import precision
from .launch import Launch, device_guard, grouped
from .tile_table import block, choose, family_of, once_per_shape
from .window_attention_geometry import Problem, tails_of
from .window_attention_single_tile import (
    window_attention_single_tile_backward_kernel,
    window_attention_single_tile_kernel,
)
from .window_attention_tiled import window_attention_tiled_kernel
from .window_attention_tiled_backward import (
    window_attention_bias_gradient_kernel,
    window_attention_kv_gradient_kernel,
    window_attention_q_gradient_kernel,
)

Size = tuple[int, ...]
Optional = torch.Tensor | None

# --------------------------------------------------------------------------- decided once for a shape


def _tiles(kernel: str, problem: Problem) -> dict[str, Any]:
    shape, family = problem.shape(), family_of(problem.device)
    bits = 8 * problem.dtype.itemsize
    return choose(kernel, family, bits=bits, tokens=shape.tokens, block_d=block(shape.head_dim))


def _single_tile_arguments(kernel: str, problem: Problem, waves: int) -> tuple[int, dict[str, Any]]:
    """Groups of windows that go through one program each, and arguments."""
    windows = problem.windows
    per_program, groups = grouped(windows, problem.heads, waves)
    arguments = {"windows": windows, "per_program": per_program, "BLOCK": block(problem.shape().tokens)}
    return groups, problem.arguments() | arguments | _tiles(kernel, problem)


def _tiled_launch(kernel: str, axis: str, problem: Problem) -> Launch:
    """A program for each block of queries (M) or keys (N) of each window and head."""
    tokens, tiles = problem.shape().tokens, _tiles(kernel, problem)
    blocks = triton.cdiv(tokens, tiles[f"BLOCK_{axis}"])
    return (problem.windows * problem.heads * blocks,), problem.arguments() | tiles | tails_of(tokens, tiles)


@once_per_shape
def _forward_launch(problem: Problem, single_tile: bool) -> Launch:
    if not single_tile:
        return _tiled_launch("tiled", "M", problem)
    groups, arguments = _single_tile_arguments("single_tile", problem, 4)
    return (groups * problem.heads,), arguments


class _Backward(NamedTuple):
    """Launches of a backward pass, and the shapes of its sums over some windows; None for those that nobody needs."""

    launches: tuple[Launch, ...]
    bias: Size | None  # [groups of windows, heads, tokens, tokens]
    pad_token: Size | None  # [windows, heads, blocks of keys, 2, d], of k and v
    attn_scale: Size | None  # [groups of windows, heads, blocks of queries]

    def new_sums(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Float32; any tensor stands for one that is not written."""
        return (
            qkv if self.bias is None else qkv.new_empty(self.bias, dtype=torch.float32),
            qkv if self.pad_token is None else qkv.new_zeros(self.pad_token, dtype=torch.float32),
            qkv if self.attn_scale is None else qkv.new_empty(self.attn_scale, dtype=torch.float32),
        )

    @classmethod
    def of(
        cls, problem: Problem, bias_gradient: bool, launches: tuple[Launch, ...],
        bias_groups: int, key_blocks: int, groups: int, query_blocks: int,
    ) -> _Backward:  # fmt: skip
        """Shapes that follow from the numbers of programs."""
        shape, heads = problem.shape(), problem.heads
        return cls(
            launches,
            (bias_groups, heads, shape.tokens, shape.tokens) if bias_gradient else None,
            (problem.windows, heads, key_blocks, 2, shape.head_dim) if shape.HAS_PAD_VALUE else None,
            (groups, heads, query_blocks) if shape.HAS_ATTN_SCALE else None,
        )


@once_per_shape
def _single_tile_backward(problem: Problem, bias_gradient: bool) -> _Backward:
    groups, arguments = _single_tile_arguments("single_tile_backward", problem, 1)
    launch = (groups * problem.heads,), arguments | {"BIAS_GRADIENT": bias_gradient}
    return _Backward.of(problem, bias_gradient, (launch,), groups, 1, groups, 1)


@once_per_shape
def _tiled_backward(problem: Problem, bias_gradient: bool) -> _Backward:
    tokens, windows, tiles = problem.shape().tokens, problem.windows, _tiles("bias_gradient", problem)
    pieces = problem.heads * triton.cdiv(tokens, tiles["BLOCK_M"]) * triton.cdiv(tokens, tiles["BLOCK_N"])
    per_program, groups = grouped(windows, pieces)
    bias = (groups * pieces,), problem.arguments() | tiles | {"windows": windows, "per_program": per_program}
    q, kv = _tiled_launch("q_gradient", "M", problem), _tiled_launch("kv_gradient", "N", problem)
    query_blocks, key_blocks = triton.cdiv(tokens, q[1]["BLOCK_M"]), triton.cdiv(tokens, kv[1]["BLOCK_N"])
    return _Backward.of(problem, bias_gradient, (q, kv, bias), groups, key_blocks, windows, query_blocks)


# --------------------------------------------------------------------------- launches


def _tensors(qkv: torch.Tensor, bias: Optional, pad_token: Optional, attn_scale: Optional) -> tuple[torch.Tensor, ...]:
    """The first arguments of all kernels; any tensor stands for one that is not read."""
    return (
        qkv,
        qkv if pad_token is None else pad_token.to(qkv.dtype).contiguous(),
        qkv if bias is None else bias.contiguous(),
        qkv if attn_scale is None else attn_scale.contiguous(),
    )


def _problem(
    qkv: torch.Tensor, heads: int, window: list[int], shift: list[int], layout: str, bias: Optional,
    pad_token: Optional, attn_scale: Optional,
) -> Problem:  # fmt: skip
    return Problem(
        qkv.shape, qkv.dtype, qkv.device, heads, (*window,), (*shift,), layout,
        bias is not None, pad_token is not None, attn_scale is not None, precision(qkv.dtype),
    )  # fmt: skip


def window_attention(
    qkv: torch.Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: Optional,
    pad_token: Optional,
    attn_scale: Optional,
    statistics: Optional,
) -> torch.Tensor:
    """Attention inside windows on a GPU: qkv [B, H, W, 3*heads*head_dim], float32, float16 or bfloat16.

    bias [heads, tokens, tokens], pad_token [3*heads*head_dim] and attn_scale [heads] are of any floating dtype.
    statistics [2, B, H, W, heads], float32, is filled with the largest score of each query and 1 / sum of its weights;
    without it each window is one tile.
    """
    qkv = qkv.contiguous()
    output = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)  # [B, H, W, heads*d]
    if qkv.numel() == 0:
        return output
    problem = _problem(qkv, num_heads, window, shift, layout, bias, pad_token, attn_scale)
    grid, arguments = _forward_launch(problem, statistics is None)
    tensors = (*_tensors(qkv, bias, pad_token, attn_scale), output)
    with device_guard(qkv):
        if statistics is None:
            window_attention_single_tile_kernel[grid](*tensors, scale=scale, **arguments)
        else:
            window_attention_tiled_kernel[grid](*tensors, *statistics.unbind(), scale=scale, **arguments)
    return output


def _start_tiled_backward(
    plan: _Backward,
    tensors: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    statistics: torch.Tensor,
    grad_qkv: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> None:
    largest, inverse = statistics.unbind()
    delta = torch.empty_like(largest)  # [B, H, W, heads], as the next
    share = delta if plan.attn_scale is None else torch.empty_like(largest)
    tensors = (*tensors, largest, inverse, delta, share)
    (q_grid, q_arguments), (kv_grid, kv_arguments), (bias_grid, bias_arguments) = plan.launches
    window_attention_q_gradient_kernel[q_grid](*tensors, output, grad_qkv, sums[2], scale=scale, **q_arguments)
    window_attention_kv_gradient_kernel[kv_grid](*tensors, grad_qkv, sums[1], scale=scale, **kv_arguments)
    if plan.bias is not None:
        window_attention_bias_gradient_kernel[bias_grid](*tensors, sums[0], scale=scale, **bias_arguments)


def window_attention_backward(
    grad_output: torch.Tensor,
    qkv: torch.Tensor,
    output: torch.Tensor,
    statistics: Optional,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: Optional,
    pad_token: Optional,
    attn_scale: Optional,
    wanted: list[bool],
) -> tuple[torch.Tensor, Optional, Optional, Optional]:
    """Gradients of qkv and, where `wanted`, of bias, pad_token and attn_scale; None elsewhere."""
    qkv, grad_output = qkv.contiguous(), grad_output.contiguous()
    grad_qkv = torch.empty_like(qkv)
    problem = _problem(qkv, num_heads, window, shift, layout, bias, pad_token, attn_scale)
    bias_gradient = wanted[0] and bias is not None
    tensors = (*_tensors(qkv, bias, pad_token, attn_scale), grad_output)
    with device_guard(qkv):
        if statistics is None:
            plan = _single_tile_backward(problem, bias_gradient)
            sums, ((grid, arguments),) = plan.new_sums(qkv), plan.launches
            window_attention_single_tile_backward_kernel[grid](*tensors, grad_qkv, *sums, scale=scale, **arguments)
        else:
            plan = _tiled_backward(problem, bias_gradient)
            sums = plan.new_sums(qkv)
            _start_tiled_backward(plan, tensors, output.contiguous(), statistics, grad_qkv, sums, scale)
    grad_bias = grad_pad_token = grad_attn_scale = None
    if bias is not None and wanted[0]:
        grad_bias = sums[0].sum(0).to(bias.dtype)
    if pad_token is not None and wanted[1]:
        grad_pad_token = torch.zeros_like(pad_token)  # nobody looks at q
        if plan.pad_token is not None:
            grad_kv = sums[1].sum((0, 2)).transpose(0, 1)  # [2, heads, d]
            grad_pad_token.view(3, num_heads, -1)[1:].copy_(grad_kv)
    if attn_scale is not None and wanted[2]:
        grad_attn_scale = sums[2].sum((0, 2)).to(attn_scale.dtype)
    return grad_qkv, grad_bias, grad_pad_token, grad_attn_scale
