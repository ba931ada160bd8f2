"""The square's Taylor rule, and the template of an op: the smallest one that has a file of every kind.

With x(t) the input along a curve, y = x^2, y' = 2 x x', y'' = 2 x x'' + 2 x'^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .taylor_op import taylor_op
from .taylor_utils import chain_rule, check_stack, compute_dtype


def square_taylor_reference(x: Tensor) -> Tensor:
    """`square_taylor` in plain PyTorch operations: any device, any transform, differentiable any number of times."""
    rows = x.to(compute_dtype(x))  # [orders + 1, ...]
    value = rows[0]
    return chain_rule(rows, value * value, 2 * value, torch.full_like(value, 2.0)).to(x.dtype)


def _triton(x: Tensor) -> Tensor:
    """kernels/square_taylor.py."""
    from asvit_fast.kernels.square_taylor import square_taylor

    return square_taylor(x)


SQUARE_TAYLOR = taylor_op("square_taylor", square_taylor_reference, triton=_triton)


def square_taylor(x: Tensor) -> Tensor:
    """Square of a value and of its first derivatives along a curve, in one pass.

    Args:
        x: [orders + 1, ...], the value, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).

    Returns:
        The same for y = x^2: [orders + 1, ...], contiguous, of x's dtype.

    Raises:
        InputError: if x has no or more than 3 rows or is not floating point.

    Examples:
        >>> import torch, asvit_fast as af
        >>> af.ops.square_taylor(torch.tensor([[3.0], [1.0], [0.0]])).flatten()  # x = 3 + t
        tensor([9., 6., 2.])
    """
    check_stack("square_taylor", x)
    return SQUARE_TAYLOR(x)
