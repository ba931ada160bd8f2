"""Biases of attention scores from a table with a row for each relative position, and the table's gradient, on a GPU. No
float atomics: the pairs of tokens of a row are added up in the order of their numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import Launcher
from .tile_table import once_per_shape

SIZES = ("pairs", "heads")  # whose value or divisibility must not compile another kernel
PAIRS, PAIRS_OF_ROW = 512, 64  # of a program; of a row at a time, as many as windows of 8 x 8 have at most


@triton.jit(do_not_specialize=SIZES)
def position_bias_kernel(
    table_pointer,  # [rows, heads]
    index_pointer,  # [pairs]
    output_pointer,  # [heads, pairs]
    pairs, heads, PAIRS: tl.constexpr,
):  # fmt: skip
    """Each program: PAIRS pairs of one head."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    pair = tl.program_id(0) // heads * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(index_pointer + pair, mask=pair < pairs, other=0).to(tl.int64)
    bias = tl.load(table_pointer + row * heads + head, mask=pair < pairs, other=0.0)
    tl.store(output_pointer + head * pairs + pair, bias, mask=pair < pairs)


@triton.jit(do_not_specialize=SIZES)
def position_bias_gradient_kernel(
    gradient_pointer,  # [heads, pairs]
    order_pointer,  # [pairs], sorted by row
    starts_pointer,  # [rows + 1], of rows in `order`
    grad_table_pointer,  # [rows, heads]
    pairs, heads, PAIRS_OF_ROW: tl.constexpr,
):  # fmt: skip
    """Each program: one row and head of the table."""
    row, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    first, end = tl.load(starts_pointer + row), tl.load(starts_pointer + row + 1)
    total = tl.zeros([PAIRS_OF_ROW], dtype=tl.float32)
    for start in range(first, end, PAIRS_OF_ROW):
        place = start + tl.arange(0, PAIRS_OF_ROW)
        pair = tl.load(order_pointer + place, mask=place < end, other=0)
        total += tl.load(gradient_pointer + head * pairs + pair, mask=place < end, other=0.0).to(tl.float32)
    result = tl.sum(total, 0).to(grad_table_pointer.dtype.element_ty)
    tl.store(grad_table_pointer + tl.program_id(0).to(tl.int64), result)


@once_per_shape
def _launcher(pairs: int, heads: int) -> Launcher:
    arguments = {"pairs": pairs, "heads": heads, "PAIRS": PAIRS, "num_warps": 4, "enable_fp_fusion": True}
    return Launcher(position_bias_kernel, (triton.cdiv(pairs, PAIRS) * heads,), arguments)


@once_per_shape
def _gradient_launcher(pairs: int, rows: int, heads: int) -> Launcher:
    arguments = {"pairs": pairs, "heads": heads, "PAIRS_OF_ROW": PAIRS_OF_ROW, "num_warps": 2, "enable_fp_fusion": True}
    return Launcher(position_bias_gradient_kernel, (rows * heads,), arguments)


def position_bias(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather [heads, *pairs] from a table [rows, heads], by the row of each pair, index [*pairs]."""
    heads = table.shape[1]
    output = table.new_empty((heads, *index.shape))
    _launcher(index.numel(), heads)(table.contiguous(), index.contiguous(), output)
    return output


def position_bias_gradient(gradient: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Sum [heads, *pairs] over the pairs of each row: [rows, heads], in float32.

    Args:
        gradient: float32, float16 or bfloat16.
        order: [pairs], int32, their numbers sorted by row; starts: [rows + 1], int32, where each row begins.
    """
    heads, rows = gradient.shape[0], starts.shape[0] - 1
    grad_table = gradient.new_empty((rows, heads))
    _gradient_launcher(order.shape[0], rows, heads)(gradient.contiguous(), order, starts, grad_table)
    return grad_table
