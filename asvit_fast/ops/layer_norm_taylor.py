"""LayerNorm's Taylor rule: one pass that pushes a value and its derivatives through the normalisation.

With c = x - <x>, <> the mean of a row, r = (<c c> + eps)^-1/2, u = r c in every order, a = <u u'> and
b = <u' u'> + <u u''>, the derivatives of y = u are

    y' = u' - a u,    y'' = u'' - 2 a u' + (3 a^2 - b) u.

torch's own second-order forward mode through its fused LayerNorm is wrong (pytorch/pytorch#196700); this is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_eps
from .taylor_op import taylor_op
from .taylor_utils import add_to_value, check_channels, check_rows, compute_dtype


def unit_scale(c: Tensor, dims: tuple[int, ...], eps: float, total: bool = False) -> Tensor:
    """Derivatives of c / sqrt(<c c> + eps), <> the mean (or the sum, if `total`) over `dims` (negative).

    c [orders + 1, *shape] -> [orders + 1, *shape].
    """

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dims, keepdim=True) if total else (left * right).mean(dims, keepdim=True)

    u = c * torch.rsqrt(product(c[0], c[0]) + eps)
    orders = [u[0]]
    if len(u) >= 2:
        a = product(u[0], u[1])
        orders.append(u[1] - a * u[0])
        if len(u) == 3:
            b = product(u[1], u[1]) + product(u[0], u[2])
            orders.append(u[2] - 2 * a * u[1] + (3 * a * a - b) * u[0])
    return torch.stack(orders)


def layer_norm_taylor_reference(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`layer_norm_taylor` in plain PyTorch operations: any device, any transform, differentiable any number of
    times."""
    dtype = compute_dtype(x)
    rows = x.to(dtype)  # [orders + 1, ..., C]
    y = unit_scale(rows - rows.mean(-1, keepdim=True), (-1,), eps)
    if weight is not None:
        y = y * weight.to(dtype)
    if bias is not None:
        y = add_to_value(y, bias.to(dtype))
    return y.to(x.dtype)


LAYER_NORM_TAYLOR = taylor_op("layer_norm_taylor", layer_norm_taylor_reference)


def layer_norm_taylor(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension of a value and of its first derivatives along a curve, in one pass.

    Args:
        x: [orders + 1, ..., C], the value, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).
        weight, bias: [C], or None for 1 and 0.
        eps: added to the variance.

    Returns:
        The same for y = (x - mean) / sqrt(variance + eps) * weight + bias: [orders + 1, ..., C], contiguous, of x's
        dtype. The variance is that of the centred row, so a common offset does not cancel digits.

    Raises:
        InputError: if x has no or more than 3 rows, no last dimension or is not floating point, or if weight or bias
            is not [C], or if eps is negative or not finite.

    Examples:
        >>> import torch, asvit_fast as af
        >>> af.ops.layer_norm_taylor(torch.randn(2, 5, 8), torch.ones(8), torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    check_eps("layer_norm_taylor", eps)
    check_rows("layer_norm_taylor", x)
    check_channels("layer_norm_taylor", "weight", weight, x)
    check_channels("layer_norm_taylor", "bias", bias, x)
    return LAYER_NORM_TAYLOR(x, weight, bias, eps)
