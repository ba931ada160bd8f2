"""Tanh's Taylor rule: one pass that pushes a value and its derivatives through y = tanh(x).

With x(t) the input along a curve, y' = (1 - y^2) x' and y'' = (1 - y^2) (x'' - 2 y x'^2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .taylor_op import taylor_op
from .taylor_utils import chain_rule, check_stack, compute_dtype


def tanh_taylor_reference(x: Tensor) -> Tensor:
    """`tanh_taylor` in plain PyTorch operations: any device, any transform, differentiable any number of times."""
    rows = x.to(compute_dtype(x))  # [orders + 1, ...]
    y = torch.tanh(rows[0])
    first = 1 - y * y
    return chain_rule(rows, y, first, -2 * y * first).to(x.dtype)


TANH_TAYLOR = taylor_op("tanh_taylor", tanh_taylor_reference)


def tanh_taylor(x: Tensor) -> Tensor:
    """Tanh of a value and of its first derivatives along a curve, in one pass.

    Args:
        x: [orders + 1, ...], the value, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).

    Returns:
        The same for y = tanh(x): [orders + 1, ...], contiguous, of x's dtype. NaN passes through.

    Raises:
        InputError: if x has no or more than 3 rows or is not floating point.

    Examples:
        >>> import torch, asvit_fast as af
        >>> af.ops.tanh_taylor(torch.tensor([[0.0], [2.0]]))[1]  # the derivative at 0 along the velocity 2
        tensor([2.])
    """
    check_stack("tanh_taylor", x)
    return TANH_TAYLOR(x)
