"""Windowed attention on a GPU: q, k, v are read where the projections left them, one fused map or three, and so are
gradients written. Window, shift and padding are index arithmetic.

Kernels: window_attention_single_tile.py for windows that fit a tile, window_attention_tiled.py and its backward for
larger ones, window_attention_overlap.py where windows of keys overlap. No float atomics: sums have an order that only
shapes decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .dot import precision
from .launch import Launch, Launcher, grouped
from .tile_table import block, choose, family_of, once_per_shape
from .window_attention_geometry import Problem, Size, tails_of
from .window_attention_overlap import BLOCK_C, BLOCK_M, window_attention_overlap_kernel
from .window_attention_single_tile import (
    window_attention_single_tile_backward_kernel,
    window_attention_single_tile_kernel,
)
from .window_attention_tiled import window_attention_tiled_kernel
from .window_attention_tiled_backward import (
    CHUNK_M,
    window_attention_bias_gradient_kernel,
    window_attention_q_gradient_kernel,
    window_attention_tiled_backward_kernel,
)

Optional = torch.Tensor | None
Tensors = tuple[torch.Tensor, ...]

# --------------------------------------------------------------------------- decided once for a shape


def _tiles(kernel: str, problem: Problem) -> dict[str, Any]:
    shape, family = problem.shape(), family_of(problem.device)
    bits = 8 * problem.dtype.itemsize
    width = block(shape.head_dim)
    return choose(kernel, family, bits=bits, tokens=shape.keys, block_d=width, axes=len(problem.size))


def _single_tile_arguments(kernel: str, problem: Problem, waves: int) -> tuple[int, dict[str, Any]]:
    """Groups of windows that go through one program each, and arguments."""
    windows, shape = problem.windows, problem.shape()
    per_program, groups = grouped(windows, problem.heads, waves)
    arguments = {"windows": windows, "per_program": per_program}
    arguments |= {"BLOCK_M": block(shape.tokens), "BLOCK_N": block(shape.keys)}
    return groups, problem.arguments() | arguments | _tiles(kernel, problem)


def _tiled_launch(kernel: str, axis: str, problem: Problem) -> Launch:
    """A program for each block of queries (M) or keys (N) of each window and head."""
    shape, tiles = problem.shape(), _tiles(kernel, problem)
    blocks = triton.cdiv(shape.tokens if axis == "M" else shape.keys, tiles[f"BLOCK_{axis}"])
    arguments = problem.arguments() | tiles | tails_of(shape.tokens, shape.keys, tiles)
    return (problem.windows * problem.heads * blocks,), arguments


@once_per_shape
def _forward_launcher(problem: Problem, single_tile: bool) -> Launcher:
    if not single_tile:
        return Launcher(window_attention_tiled_kernel, *_tiled_launch("tiled", "M", problem))
    groups, arguments = _single_tile_arguments("single_tile", problem, 4)
    return Launcher(window_attention_single_tile_kernel, (groups * problem.heads,), arguments)


class _Sums(NamedTuple):
    """Sums over some windows, float32; any tensor stands for one that is not written."""

    bias: torch.Tensor  # [groups of windows, heads, tokens, keys]
    pad_token: torch.Tensor  # [windows, heads, blocks of keys, 2, d], of k and v
    attn_scale: torch.Tensor  # [groups of windows, heads, blocks of queries], as the next
    head_scale: torch.Tensor


class _Backward(NamedTuple):
    """Launches of a backward pass, and the shapes of what they write besides gradients; None for what nobody needs."""

    launchers: tuple[Launcher, ...]
    bias: Size | None  # as in _Sums, as the next three
    pad_token: Size | None
    attn_scale: Size | None
    head_scale: Size | None
    in_windows: Size | None  # [2, windows, keys, channels], gradients of k and v where windows overlap
    overlap: Launcher | None  # which sums them
    kept: tuple[Size, ...] = ()  # [windows * heads * chunks, 5, rows], [programs, rows, width]: read again by kernels

    def new_sums(self, q: torch.Tensor) -> _Sums:
        """Uninitialised, but for zeros where only some windows have padding."""
        return _Sums(
            q if self.bias is None else q.new_empty(self.bias, dtype=torch.float32),
            q if self.pad_token is None else q.new_zeros(self.pad_token, dtype=torch.float32),
            q if self.attn_scale is None else q.new_empty(self.attn_scale, dtype=torch.float32),
            q if self.head_scale is None else q.new_empty(self.head_scale, dtype=torch.float32),
        )

    @classmethod
    def of(
        cls, problem: Problem, bias_gradient: bool, launchers: tuple[Launcher, ...],
        bias_groups: int, key_blocks: int, groups: int, query_blocks: int,
    ) -> _Backward:  # fmt: skip
        """Shapes that follow from the numbers of programs."""
        shape, heads, windows = problem.shape(), problem.heads, problem.windows
        return cls(
            launchers,
            (bias_groups, heads, shape.tokens, shape.keys) if bias_gradient else None,
            (windows, heads, key_blocks, 2, shape.head_dim) if shape.HAS_PAD_VALUE else None,
            (groups, heads, query_blocks) if shape.HAS_ATTN_SCALE else None,
            (groups, heads, query_blocks) if shape.HAS_HEAD_SCALE else None,
            (2, windows, shape.keys, shape.channels) if shape.OVERLAP else None,
            _overlap_launcher(problem) if shape.OVERLAP else None,
        )


def _overlap_launcher(problem: Problem) -> Launcher:
    """A program for each block of tokens and of channels."""
    blocks = triton.cdiv(math.prod(problem.size), BLOCK_M) * triton.cdiv(problem.channels, BLOCK_C)
    names = ("depth", "height", "width", "SHAPE")
    arguments = {name: value for name, value in problem.arguments().items() if name in names}
    options = {"BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C, "num_warps": 4, "enable_fp_fusion": True}
    arguments |= {"windows": problem.windows}
    return Launcher(window_attention_overlap_kernel, (problem.batch * blocks,), arguments | options)


@once_per_shape
def _single_tile_backward(problem: Problem, bias_gradient: bool) -> _Backward:
    groups, arguments = _single_tile_arguments("single_tile_backward", problem, 1)
    arguments |= {"BIAS_GRADIENT": bias_gradient}
    launcher = Launcher(window_attention_single_tile_backward_kernel, (groups * problem.heads,), arguments)
    return _Backward.of(problem, bias_gradient, (launcher,), groups, 1, groups, 1)


@once_per_shape
def _tiled_backward(problem: Problem, bias_gradient: bool) -> _Backward:
    shape, windows, heads, tiles = problem.shape(), problem.windows, problem.heads, _tiles("tiled_backward", problem)
    if shape.HAS_ATTN_SCALE:  # one tile of weights more: blocks of 64 spill, and ptxas 12.8 makes mistakes
        tiles["BLOCK_M"] = min(tiles["BLOCK_M"], 32)
    tiles |= tails_of(shape.tokens, shape.keys, tiles)
    full, rest = divmod(shape.tokens, tiles["BLOCK_M"])
    query_blocks, key_blocks = full + (rest > 0), triton.cdiv(shape.keys, tiles["BLOCK_N"])
    rows = full * tiles["BLOCK_M"] + (tiles["TAIL_M"] if rest else 0)
    # half as many programs as elsewhere: each that a window has prepares all of its queries for itself
    blocks, chunks = grouped(key_blocks, 2 * windows * heads)
    width = 8 * triton.cdiv(shape.head_dim, 8)
    common = problem.arguments() | {"chunks": chunks, "ROWS": rows}
    programs = windows * heads * chunks
    arguments = common | tiles | {"blocks": blocks, "WIDTH": width}
    launchers = [Launcher(window_attention_tiled_backward_kernel, (programs,), arguments)]
    if chunks > 1:
        launchers.append(_chunks_launcher(problem, common | {"WIDTH": width}))
    bias_groups = 1
    if bias_gradient:
        launcher, bias_groups = _bias_launcher(problem, common)
        launchers.append(launcher)
    plan = _Backward.of(problem, bias_gradient, tuple(launchers), bias_groups, key_blocks, windows, query_blocks)
    return plan._replace(kept=((programs, 5, rows), (programs, rows, width)))


def _chunks_launcher(problem: Problem, arguments: dict[str, Any]) -> Launcher:
    """A program for each block of queries of each window and head."""
    blocks = triton.cdiv(problem.shape().tokens, CHUNK_M)
    arguments = arguments | {"BLOCK_M": CHUNK_M, "num_warps": 4, "enable_fp_fusion": True}
    return Launcher(window_attention_q_gradient_kernel, (problem.windows * problem.heads * blocks,), arguments)


def _bias_launcher(problem: Problem, arguments: dict[str, Any]) -> tuple[Launcher, int]:
    """A program for each tile of each head's bias and each group of windows, and how many groups there are."""
    shape, tiles = problem.shape(), _tiles("bias_gradient", problem)
    pieces = problem.heads * triton.cdiv(shape.tokens, tiles["BLOCK_M"]) * triton.cdiv(shape.keys, tiles["BLOCK_N"])
    per_program, groups = grouped(problem.windows, pieces)
    arguments = arguments | tiles | {"windows": problem.windows, "per_program": per_program}
    return Launcher(window_attention_bias_gradient_kernel, (groups * pieces,), arguments), groups


# --------------------------------------------------------------------------- operands


def _token_stride(x: torch.Tensor) -> int | None:
    """Elements from each token of a map [B, *size, channels] to the next, None if they or channels lie otherwise."""
    channels = x.shape[-1]
    if x.is_contiguous():
        return channels
    if channels > 1 and x.stride(-1) != 1:
        return None
    distance, tokens = None, 1
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        distance = stride if distance is None else distance
        if stride != distance * tokens:
            return None
        tokens *= size
    return channels if distance is None else distance


def _operands(
    projections: Sequence[Optional], parameters: Sequence[Optional], num_heads: int, window: Sequence[int],
    shift: Sequence[int], kv_window: Sequence[int], layout: str, scale: float,
) -> tuple[Tensors, Problem]:  # fmt: skip
    """Of the fused map and None twice, or three maps, and of bias, padding, attn_scale and head_scale: the first
    arguments of all kernels, q, k, v, padding, bias, attn_scale and head_scale, where any tensor stands for one that is
    not read; and what decides how kernels are launched."""
    maps, distances = [], []
    for x in projections:
        if x is not None:
            distance = _token_stride(x)
            maps.append(x.contiguous() if distance is None else x)
            distances.append(x.shape[-1] if distance is None else distance)
    fused, q = len(maps) == 1, maps[0]
    repeated = 3 if fused else 1
    bias, padding, attn_scale, head_scale = parameters
    tensors = (
        *maps * repeated,
        q if padding is None else padding.to(q.dtype).contiguous(),
        q if bias is None else bias.contiguous(),
        q if attn_scale is None else attn_scale.contiguous(),
        q if head_scale is None else head_scale.contiguous(),
    )
    problem = Problem(
        q.shape[1:-1], q.shape[0], q.shape[-1] // repeated, (*distances * repeated,), fused, q.dtype, q.device,
        num_heads, (*window,), (*shift,), (*kv_window,), layout, bias is not None, padding is not None,
        attn_scale is not None, head_scale is not None, scale > 0.0, precision(q.dtype),
    )  # fmt: skip
    return tensors, problem


# --------------------------------------------------------------------------- launches


def window_attention(
    q: torch.Tensor,
    k: Optional,
    v: Optional,
    bias: Optional,
    padding: Optional,
    attn_scale: Optional,
    head_scale: Optional,
    num_heads: int,
    window: list[int],
    shift: list[int],
    kv_window: list[int],
    scale: float,
    layout: str,
    statistics: Optional,
) -> torch.Tensor:
    """Attention inside windows on a GPU, [B, *size, heads*head_dim]: q is the fused map [B, *size, 3*heads*head_dim],
    or q, k and v are maps [B, *size, heads*head_dim], with two or three axes, float32, float16 or bfloat16. They are
    read in place where all tokens are as far apart and channels are neighbours, else copied.

    bias [heads, tokens, keys], padding [3*heads*head_dim], attn_scale and head_scale [heads] are of any floating dtype.
    statistics [2, B, *size, heads], float32, is filled with the largest score of each query and 1 / sum of its weights;
    without it each window is one tile.
    """
    channels = q.shape[-1] // (3 if k is None else 1)
    output = q.new_empty((*q.shape[:-1], channels))  # [B, *size, heads*d]
    if q.numel() == 0:
        return output
    parameters = (bias, padding, attn_scale, head_scale)
    tensors, problem = _operands((q, k, v), parameters, num_heads, window, shift, kv_window, layout, scale)
    rows = () if statistics is None else statistics.unbind()
    _forward_launcher(problem, statistics is None)(*tensors, output, *rows, scale=float(scale))
    return output


def _start_tiled_backward(
    plan: _Backward, tensors: Tensors, output: torch.Tensor, statistics: torch.Tensor,
    gradients: Sequence[torch.Tensor], totals: _Sums, scale: float,
) -> None:  # fmt: skip
    statistics_size, (programs, *row) = plan.kept
    kept, sums = statistics.new_empty(statistics_size), statistics.new_empty((programs, *row))
    rows = output.new_empty((programs, 2, *row))
    start, *others = plan.launchers
    start(*tensors, kept, rows, sums, output, *statistics.unbind(), *gradients, *totals[1:], scale=scale)
    if start.arguments["chunks"] > 1:
        others.pop(0)(*tensors[:7], sums, gradients[0], scale=scale)
    for start_bias in others:
        start_bias(*tensors, kept, totals.bias, scale=scale)


def window_attention_backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    statistics: Optional,
    q: torch.Tensor,
    k: Optional,
    v: Optional,
    bias: Optional,
    padding: Optional,
    attn_scale: Optional,
    head_scale: Optional,
    num_heads: int,
    window: list[int],
    shift: list[int],
    kv_window: list[int],
    scale: float,
    layout: str,
    needs_grad: list[bool],
) -> list[Optional]:
    """Gradients of the seven operands, contiguous; None for those that are not there or need none."""
    parameters = (bias, padding, attn_scale, head_scale)
    tensors, problem = _operands((q, k, v), parameters, num_heads, window, shift, kv_window, layout, scale)
    bias_gradient = bias is not None and needs_grad[3]
    plan = (_single_tile_backward if statistics is None else _tiled_backward)(problem, bias_gradient)
    tensors, sums = (*tensors, gradient.contiguous()), plan.new_sums(q)
    found = [q.new_empty(x.shape) for x in (q, k, v) if x is not None]
    maps = found * 3 if problem.fused else found
    in_windows = None if plan.in_windows is None else q.new_empty(plan.in_windows)
    written = maps if in_windows is None else [maps[0], *in_windows]
    if statistics is None:
        plan.launchers[0](*tensors, *written, *sums, scale=float(scale))
    else:
        _start_tiled_backward(plan, tensors, output.contiguous(), statistics, written, sums, float(scale))
    if plan.overlap is not None:
        plan.overlap(in_windows, *maps)
    gradients: list[Optional] = [*found, None, None] if problem.fused else [*found]
    gradients += _of_parameters(plan, sums, parameters, num_heads, scale)
    return [new if want else None for new, want in zip(gradients, needs_grad, strict=True)]


def _of_parameters(
    plan: _Backward, sums: _Sums, parameters: Sequence[Optional], num_heads: int, scale: float
) -> list[Optional]:
    """Gradients of bias, padding, attn_scale and head_scale, as far as there are sums."""
    bias, padding, attn_scale, head_scale = parameters
    grad_padding = None if padding is None else torch.zeros_like(padding)  # nobody looks at q
    if grad_padding is not None and plan.pad_token is not None:
        grad_kv = sums.pad_token.sum((0, 2)).transpose(0, 1)  # [2, heads, d]
        grad_padding.view(3, num_heads, -1)[1:].copy_(grad_kv)
    return [
        None if bias is None or plan.bias is None else sums.bias.sum(0).to(bias.dtype),
        grad_padding,
        None if attn_scale is None else sums.attn_scale.sum((0, 2)).to(attn_scale.dtype),
        None if head_scale is None else (sums.head_scale.sum((0, 2)) * scale).to(head_scale.dtype),
    ]
