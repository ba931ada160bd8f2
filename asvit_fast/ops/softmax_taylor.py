"""Softmax's Taylor rule: one pass that pushes logits and their derivatives through p = softmax(s).

With <> the mean of a row under p and d = s' - <s'>, e = s'' - <s''>, one exp serves all orders:

    p' = p d,    p'' = p (e + d^2 - <e + d^2>).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .taylor_op import taylor_op
from .taylor_utils import check_rows, compute_dtype


def subtract_weighted_mean(s: Tensor, p: Tensor) -> Tensor:
    """s - <s>, <> the mean under p over the last dimension; s, p: [..., N].

    In two steps: what all of a row have in common is gone after the first, and with it its rounding errors.
    """
    s = s - (p * s).sum(-1, keepdim=True)
    return s - (p * s).sum(-1, keepdim=True)


def softmax_taylor_reference(s: Tensor) -> Tensor:
    """`softmax_taylor` in plain PyTorch operations: any device, any transform, differentiable any number of
    times."""
    rows = s.to(compute_dtype(s)).unbind(0)  # (s, s', s''), as many as there are
    p = torch.softmax(rows[0], -1)
    derivatives = [row.masked_fill(p == 0, 0.0) for row in rows[1:]]
    orders = [p]
    if derivatives:
        d = subtract_weighted_mean(derivatives[0], p)
        orders.append(p * d)
        if len(derivatives) == 2:
            orders.append(p * subtract_weighted_mean(subtract_weighted_mean(derivatives[1], p) + d * d, p))
    return torch.stack(orders).to(s.dtype)


SOFTMAX_TAYLOR = taylor_op("softmax_taylor", softmax_taylor_reference)


def softmax_taylor(s: Tensor) -> Tensor:
    """Softmax over the last dimension of logits and of their first derivatives along a curve, in one pass.

    Args:
        s: [orders + 1, ..., N], the logits, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).

    Returns:
        The same for p = softmax(s): [orders + 1, ..., N], contiguous, of s's dtype. Where p is 0 (a logit of -inf), so
        are its derivatives, whatever those of the logit; a row of nothing but -inf is NaN, as torch's is. What all
        derivatives of a row have in common cancels without loss.

    Raises:
        InputError: if s has no or more than 3 rows, no last dimension or is not floating point.

    Examples:
        >>> import torch, asvit_fast as af
        >>> p = af.ops.softmax_taylor(torch.randn(2, 5, 8))
        >>> torch.allclose(p[0].sum(-1), torch.ones(5)), torch.allclose(p[1].sum(-1), torch.zeros(5), atol=1e-6)
        (True, True)
    """
    check_rows("softmax_taylor", s)
    return SOFTMAX_TAYLOR(s)
