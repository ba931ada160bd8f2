"""A bias for every pair of positions in a window, gathered from a table: the relative position bias of Swin (arXiv
2103.14030, equation 4), whose table has an entry for each offset of a key from a query.

The gather and the sum of gradients over the pairs of an entry are each other's derivatives.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from .. import backends
from ..errors import InputError
from .checks import check_device, check_floats, check_tensor
from .fused_op import no_float64, outside_of_modes
from .transforms import transform_active

# comparisons of entries with pairs, for one head, above which torch's sort is faster than the gradient's kernel
MOST_COMPARISONS = 2**27


def position_bias_reference(table: Tensor, index: Tensor) -> Tensor:
    """`position_bias` in plain PyTorch operations."""
    return table[index].permute(2, 0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        from asvit_fast.kernels.position_bias import position_bias

        ctx.save_for_backward(index)
        ctx.entries = table.shape[0]
        return position_bias(table, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Sum.apply(gradient, index, ctx.entries), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, index: Tensor, entries: int) -> Tensor:
        from asvit_fast.kernels.position_bias import position_bias_gradient

        ctx.save_for_backward(index)
        return position_bias_gradient(gradient, index, entries)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Gather.apply(gradient, index), None, None


def _has_kernels(table: Tensor, index: Tensor) -> bool:
    """Whether the Triton kernels run: not for what torch traces or transforms, where its own gather is known."""
    if torch.compiler.is_compiling() or transform_active() or not outside_of_modes((table, index)):
        return False
    if backends.forced_backend() not in (None, "triton") or no_float64(table) is not None:
        return False
    if table.shape[0] * index.numel() > MOST_COMPARISONS:
        return False
    return backends.available("position_bias", "triton", table.device) is None


backends.declare("position_bias", {"triton": _Gather.apply, "reference": position_bias_reference})


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias of `window_attention` from a table: table [entries, heads], index [queries, keys] -> [heads, queries,
    keys].

    Args:
        table: [entries, heads], of any floating dtype.
        index: [queries, keys], the entry of each pair, integers from 0 to ``entries - 1``; negative ones count from the
            end. Others are torch's IndexError, and NaN on a GPU. Not differentiable.

    Returns:
        [heads, queries, keys] of the table's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, naming the value.

    On a GPU, one Triton kernel for the forward and one for the backward pass, which sums the table's gradient in
    float32 in a fixed order, where torch's index_put sorts all pairs. Elsewhere, in float64, for windows so large that
    sorting is faster, and while torch.compile traces, torch's own indexing.

    Examples:
        >>> import torch, asvit_fast as af
        >>> table, index = torch.arange(6.0).view(3, 2), torch.tensor([[0, 1], [2, 0]])  # 3 entries, 2 heads
        >>> af.ops.position_bias(table, index)[0]  # of the first head
        tensor([[0., 2.],
                [4., 0.]])
    """
    if has_torch_function((table, index)):
        return position_bias_reference(table, index)
    check_floats("position_bias", "table", table)
    check_tensor("position_bias", "index", index)
    if table.dim() != 2 or index.dim() != 2:
        shapes = f"{list(table.shape)} and {list(index.shape)}"
        raise InputError(f"position_bias: table must be [entries, heads] and index [queries, keys], got {shapes}")
    if index.dtype not in (torch.int64, torch.int32):
        raise InputError(f"position_bias: index must be int64 or int32, got {index.dtype}")
    check_device("position_bias", "index", index, table)
    if _has_kernels(table, index):
        return _Gather.apply(table, index)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if table.is_cpu and not torch.is_grad_enabled() and not traced:
        with contextlib.suppress(IndexError):  # of negative numbers, which count from the end below
            # a third of the time
            return table.index_select(0, index.flatten()).unflatten(0, index.shape).permute(2, 0, 1)
    return position_bias_reference(table, index)
