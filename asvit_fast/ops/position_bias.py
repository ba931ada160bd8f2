"""The bias of every pair of tokens from a table with a row for each relative position (Swin, arXiv 2103.14030, section
3.2): what ``window_attention`` takes.

torch gathers it in two kernels, and sorts all pairs in every backward pass; here it is a kernel each where
window_attention runs in Triton, outside of compiled graphs, which have gathers and sums of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from .fused_op import is_batch, outside_of_modes
from .transforms import transform_active

Pairs = tuple[Tensor, Tensor]  # of tokens, [queries * keys], sorted by row; where rows begin in it, [rows + 1]

# of index tensors: their version and the table's rows, and their pairs, None if a number is no row of the table
_pairs: Any = WeakTensorKeyDictionary()


def position_bias_reference(table: Tensor, index: Tensor, queries: int, keys: int) -> Tensor:
    """``position_bias`` in torch's operations."""
    return table[index.reshape(-1)].reshape(queries, keys, -1).permute(2, 0, 1).contiguous()


def _pairs_of(index: Tensor, rows: int) -> Pairs | None:
    """Found once for each index, with a look at its numbers: not while a CUDA graph is captured. A view may be one of
    its call, so it has to be seen twice."""
    state = (index._version, rows)
    known = _pairs.get(index)
    if known is None and index._is_view():
        _pairs[index] = (None, None)
        return None
    if known is None or known[0] != state:
        if index.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        known = (state, _sorted_pairs(index.reshape(-1), rows))
        _pairs[index] = known
    return known[1]


def _sorted_pairs(index: Tensor, rows: int) -> Pairs | None:
    if index.numel() == 0 or bool(((index < 0) | (index >= rows)).any()):
        return None  # torch says what is wrong, or counts from the end
    row, order = index.sort(stable=True)
    starts = torch.searchsorted(row, torch.arange(rows + 1, device=index.device, dtype=row.dtype))
    return order.int(), starts.int()


class _PositionBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, pairs: Pairs) -> Tensor:
        from asvit_fast.kernels.position_bias import position_bias

        ctx.save_for_backward(index)
        ctx.pairs = pairs
        return position_bias(table, index)  # [heads, *index.shape]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        from asvit_fast.kernels.position_bias import position_bias_gradient

        (index,), (order, starts) = ctx.saved_tensors, ctx.pairs
        if torch.is_grad_enabled() or is_batch(gradient) or not outside_of_modes((gradient,)):
            zeros = gradient.new_zeros(starts.shape[0] - 1, gradient.shape[0])  # [rows, heads]
            rows = gradient.reshape(gradient.shape[0], -1).permute(1, 0)  # [pairs, heads]
            return zeros.index_put((index.reshape(-1),), rows, accumulate=True), None, None
        return position_bias_gradient(gradient, order, starts), None, None


def _is_fused(table: Tensor, index: Tensor) -> bool:
    """Whether the kernels may run."""
    if torch.compiler.is_compiling() or transform_active() or not outside_of_modes((table, index)):
        return False
    if table.dim() != 2 or table.numel() == 0 or table.dtype == torch.float64 or table.device != index.device:
        return False
    if index.is_inference():  # whose numbers may change unseen
        return False
    return backends.choose("window_attention", table.device) == "triton"


def position_bias(table: Tensor, index: Tensor, queries: int, keys: int) -> Tensor:
    """Gather the bias of every pair of tokens, [heads, queries, keys].

    Args:
        table: [offsets, heads], of any floating dtype.
        index: the row of each pair, of any shape; a buffer of a module, as what the gradient needs is kept with it.
    """
    pairs = _pairs_of(index, table.shape[0]) if _is_fused(table, index) else None
    if pairs is None:
        return position_bias_reference(table, index, queries, keys)
    return _PositionBias.apply(table, index, pairs).view(-1, queries, keys)
