"""Triton kernels of a bias for pairs of positions: gathered from a table, and the table's gradient, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher
from .tile_table import once_per_shape

BLOCK, BLOCK_ENTRIES, BLOCK_PAIRS = 1024, 16, 512
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _load_entries(index_pointer, pair, pairs, entries):
    # of each pair; numbers below 0 count from the end, and behind the pairs there are none
    entry = tl.load(index_pointer + pair, mask=pair < pairs, other=entries).to(tl.int32)
    return tl.where(entry < 0, entry + entries, entry)


@triton.jit(do_not_specialize=("pairs", "entries", "heads"))
def position_bias_kernel(
    table_pointer,  # [ENTRIES, HEADS]
    index_pointer,  # [PAIRS]
    output_pointer,  # [HEADS, PAIRS]
    pairs, entries, heads,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK pairs of one head. An entry that the table does not have gives NaN."""
    head = tl.program_id(0) % heads
    pair = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    entry = _load_entries(index_pointer, pair, pairs, entries)
    there = (entry >= 0) & (entry < entries)
    values = tl.load(table_pointer + entry * heads + head, mask=there, other=float("nan"))
    tl.store(output_pointer + tl.cast(head, tl.int64) * pairs + pair, values, mask=pair < pairs)


@triton.jit(do_not_specialize=("pairs", "entries", "heads"))
def position_bias_gradient_kernel(
    grad_output_pointer,  # [HEADS, PAIRS]
    index_pointer,  # [PAIRS]
    grad_table_pointer,  # [ENTRIES, HEADS]
    pairs, entries, heads,
    BLOCK_ENTRIES: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_ENTRIES entries of one head, which look at all pairs: a sum in an order that is always the
    same, and no sorting, whatever the index."""
    head = tl.program_id(0) % heads
    entry = tl.program_id(0) // heads * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    grad_output_pointer += tl.cast(head, tl.int64) * pairs
    sums = tl.zeros([BLOCK_ENTRIES, BLOCK_PAIRS], dtype=tl.float32)
    for start in range(0, pairs, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS)
        of_pair = _load_entries(index_pointer, pair, pairs, entries)
        gradient = tl.load(grad_output_pointer + pair, mask=pair < pairs, other=0.0).to(tl.float32)
        sums += tl.where(entry[:, None] == of_pair[None, :], gradient[None, :], 0.0)
    grad_table = tl.sum(sums, 1).to(grad_table_pointer.dtype.element_ty)
    tl.store(grad_table_pointer + entry * heads + head, grad_table, mask=entry < entries)


@once_per_shape
def _launcher(pairs: int, entries: int, heads: int) -> Launcher:
    sizes = {"pairs": pairs, "entries": entries, "heads": heads}
    return Launcher(position_bias_kernel, (heads * triton.cdiv(pairs, BLOCK),), sizes | {"BLOCK": BLOCK} | OPTIONS)


@once_per_shape
def _gradient_launcher(pairs: int, entries: int, heads: int) -> Launcher:
    sizes = {"pairs": pairs, "entries": entries, "heads": heads}
    blocks = {"BLOCK_ENTRIES": BLOCK_ENTRIES, "BLOCK_PAIRS": BLOCK_PAIRS}
    grid = (heads * triton.cdiv(entries, BLOCK_ENTRIES),)
    return Launcher(position_bias_gradient_kernel, grid, sizes | blocks | OPTIONS)


def position_bias(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table [entries, heads], float32, float16 or bfloat16, and index [queries, keys] of integers on a GPU -> [heads,
    queries, keys], contiguous."""
    entries, heads = table.shape
    output = table.new_empty(heads, *index.shape)
    pairs = index.numel()
    if output.numel() == 0:
        return output
    _launcher(pairs, entries, heads)(table.contiguous(), index.contiguous(), output)
    return output


def position_bias_gradient(gradient: torch.Tensor, index: torch.Tensor, entries: int) -> torch.Tensor:
    """gradient [heads, queries, keys] and index [queries, keys] -> [entries, heads] of the gradient's dtype, summed in
    float32."""
    heads, pairs = gradient.shape[0], index.numel()
    grad_table = gradient.new_empty(entries, heads)
    if grad_table.numel() == 0:
        return grad_table
    _gradient_launcher(pairs, entries, heads)(gradient.contiguous(), index.contiguous(), grad_table)
    return grad_table
