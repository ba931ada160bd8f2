"""GELU's Taylor rule: one pass that pushes a value and its derivatives through the activation.

GELU(x) = x P(x), where P is the normal distribution function, or for `approximate="tanh"` the logistic function of
2 sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, arXiv 1606.08415). With x(t) the input along a curve,

    y = GELU(x),    y' = GELU'(x) x',    y'' = GELU'(x) x'' + GELU''(x) x'^2.

The bias of the Linear before it may come along: it is constant, so it is added to the value only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .taylor_op import taylor_op
from .taylor_utils import add_to_value, chain_rule, check_channels, check_stack, compute_dtype

SATURATION = 40.0  # beyond, P is 0 or 1 and its derivatives are 0, in single and double precision


def _normal_gate(x: Tensor, order: int) -> list[Tensor]:
    """P and its derivatives up to `order` (1 to 3) for the normal distribution; each has x's shape."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    gate = [0.5 * torch.erfc(-math.sqrt(0.5) * x), density]
    if order >= 2:
        gate.append(-x * density)
    if order >= 3:
        gate.append((x * x - 1) * density)
    return gate


def _logistic_gate(x: Tensor, order: int) -> list[Tensor]:
    """P and its derivatives up to `order` (1 to 3) for the tanh approximation; each has x's shape."""
    slope, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    u = slope * x * (1 + cubic * x * x)
    u1, u2, u3 = slope * (1 + 3 * cubic * x * x), 6 * slope * cubic * x, 6 * slope * cubic
    p, q = torch.sigmoid(u), torch.sigmoid(-u)
    product, balance = p * q, q - p  # the logistic function's derivative, and 1 - 2 P
    gate = [p, product * u1]
    if order >= 2:
        gate.append(product * (balance * u1 * u1 + u2))
    if order >= 3:
        gate.append(product * ((balance * balance - 2 * product) * u1**3 + 3 * balance * u1 * u2 + u3))
    return gate


def _derivatives(x: Tensor, approximate: str, order: int) -> list[Tensor]:
    """GELU', GELU'', ... up to `order` (1 to 3) at x, each of x's shape."""
    z = x.clamp(-SATURATION, SATURATION)
    gate = _normal_gate(z, order) if approximate == "none" else _logistic_gate(z, order)
    return [k * gate[k - 1] + z * gate[k] for k in range(1, order + 1)]  # Leibniz' rule for x P(x)


def gelu_taylor_reference(x: Tensor, approximate: str = "none", bias: Tensor | None = None) -> Tensor:
    """`gelu_taylor` in plain PyTorch operations: any device, any transform, differentiable any number of times."""
    rows = x.to(compute_dtype(x))  # [orders + 1, ...]
    if bias is not None:
        rows = add_to_value(rows, bias.to(rows.dtype))
    value = F.gelu(rows[0], approximate=approximate)
    derivatives = _derivatives(rows[0], approximate, len(rows) - 1) if len(rows) > 1 else []
    first, second = (*derivatives, None, None)[:2]
    return chain_rule(rows, value, first, second).to(x.dtype)


def _triton(x: Tensor, approximate: str, bias: Tensor | None) -> Tensor:
    """kernels/gelu_taylor.py."""
    from asvit_fast.kernels.gelu_taylor import gelu_taylor

    return gelu_taylor(x, approximate, bias)


def _adjoint(gradient: Tensor, x: Tensor, approximate: str, bias: Tensor | None) -> list[Tensor]:
    """Gradients of x [orders + 1, ...] and, where there is one, of bias [C]: half the work of what torch would derive
    from the reference."""
    dtype = compute_dtype(x)
    rows = x.to(dtype) if bias is None else add_to_value(x.to(dtype), bias.to(dtype))
    g = gradient.to(dtype).unbind(0)
    derivatives = _derivatives(rows[0], approximate, len(rows))
    grad_value = g[0] * derivatives[0]
    grad_rows = []
    if len(rows) >= 2:
        grad_value = grad_value + g[1] * derivatives[1] * rows[1]
        grad_rows.append(g[1] * derivatives[0])
    if len(rows) == 3:
        grad_value = grad_value + g[2] * (derivatives[1] * rows[2] + derivatives[2] * rows[1] * rows[1])
        grad_rows = [grad_rows[0] + 2 * g[2] * derivatives[1] * rows[1], g[2] * derivatives[0]]
    grad_x = torch.stack([grad_value, *grad_rows]).to(x.dtype)
    return [grad_x] if bias is None else [grad_x, grad_value.reshape(-1, len(bias)).sum(0).to(bias.dtype)]


GELU_TAYLOR = taylor_op("gelu_taylor", gelu_taylor_reference, triton=_triton, adjoint=_adjoint)


def gelu_taylor(x: Tensor, approximate: str = "none", bias: Tensor | None = None) -> Tensor:
    """GELU of a value and of its first derivatives along a curve, in one pass.

    Args:
        x: [orders + 1, ...], the value, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).
        approximate: "none" (normal distribution function) or "tanh", as in `torch.nn.functional.gelu`.
        bias: [C], added to the value of x [orders + 1, ..., C] before the activation, or None.

    Returns:
        The same for y = GELU(x + bias): [orders + 1, ...], contiguous, of x's dtype. NaN passes through; at infinite x,
        y is infinite or NaN, and the derivatives of GELU are their limits, 0 or 1.

    Raises:
        InputError: if x has no or more than 3 rows or is not floating point, `approximate` is unknown, or bias is not
            [C].

    Examples:
        >>> import torch, asvit_fast as af
        >>> af.ops.gelu_taylor(torch.randn(3, 2, 8)).shape  # value, velocity, acceleration
        torch.Size([3, 2, 8])
    """
    check_stack("gelu_taylor", x)
    check_channels("gelu_taylor", "bias", bias, x)
    if approximate not in ("none", "tanh"):
        raise InputError(f"gelu_taylor: approximate must be 'none' or 'tanh', got {approximate!r}")
    return GELU_TAYLOR(x, approximate, bias)
