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

from asvit_fast import _extension, backends
from asvit_fast.errors import InputError
from asvit_fast.ops.checks import check_devices
from asvit_fast.ops.decomposition import register_decomposition
from asvit_fast.ops.stacked import add_to_value, chain_rule, check_channels, check_stack, compute_dtype
from asvit_fast.ops.transforms import transform_active

SATURATION = 40.0  # beyond, P is 0 or 1 and its derivatives are 0, in single and double precision

# --------------------------------------------------------------------------- reference


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
    """`gelu_taylor` in elementary torch operations: any device, any transform, differentiable any number of times."""
    rows = x.to(compute_dtype(x))  # [orders + 1, ...]
    if bias is not None:
        rows = add_to_value(rows, bias.to(rows.dtype))
    value = F.gelu(rows[0], approximate=approximate)
    derivatives = _derivatives(rows[0], approximate, len(rows) - 1) if len(rows) > 1 else []
    first, second = (*derivatives, None, None)[:2]
    return chain_rule(rows, value, first, second).to(x.dtype)


# --------------------------------------------------------------------------- fused op


def _compiled(x: Tensor, approximate: str, bias: Tensor | None) -> Tensor:
    """C++ on the CPU, CUDA on a GPU: csrc/unary_taylor.cpp."""
    _extension.extension()
    return torch.ops.asvit_fast_C.gelu_taylor(x, approximate, bias)


def _triton(x: Tensor, approximate: str, bias: Tensor | None) -> Tensor:
    """kernels/gelu_taylor.py."""
    from asvit_fast.kernels.gelu_taylor import gelu_taylor

    return gelu_taylor(x, approximate, bias)


backends.declare("gelu_taylor", triton=_triton, cuda=_compiled, cpu=_compiled, reference=gelu_taylor_reference)


@torch.library.custom_op("asvit_fast::gelu_taylor", mutates_args=())
def _gelu_taylor(x: Tensor, approximate: str, bias: Tensor | None = None) -> Tensor:
    return backends.select("gelu_taylor", x.device)(x, approximate, bias)


@_gelu_taylor.register_fake
def _fake(x: Tensor, approximate: str, bias: Tensor | None = None) -> Tensor:
    check_devices("gelu_taylor", x, bias=bias)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_decomposition(_gelu_taylor, gelu_taylor_reference)

# --------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs: tuple[Tensor, str, Tensor | None], output: Tensor) -> None:
    x, ctx.approximate, bias = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
    """The adjoint, in elementary operations, so that it can be differentiated again."""
    x, bias = ctx.saved_tensors  # [orders + 1, ...], as is the gradient; [C] or None
    dtype = compute_dtype(x)
    rows = x.to(dtype) if bias is None else add_to_value(x.to(dtype), bias.to(dtype))
    g = gradient.to(dtype).unbind(0)
    derivatives = _derivatives(rows[0], ctx.approximate, len(rows))
    to_value = g[0] * derivatives[0]
    to_rows = []
    if len(rows) >= 2:
        to_value = to_value + g[1] * derivatives[1] * rows[1]
        to_rows.append(g[1] * derivatives[0])
    if len(rows) == 3:
        to_value = to_value + g[2] * (derivatives[1] * rows[2] + derivatives[2] * rows[1] * rows[1])
        to_rows = [to_rows[0] + 2 * g[2] * derivatives[1] * rows[1], g[2] * derivatives[0]]
    to_bias = None if bias is None else to_value.reshape(-1, len(bias)).sum(0).to(bias.dtype)
    return torch.stack([to_value, *to_rows]).to(x.dtype), None, to_bias


_gelu_taylor.register_autograd(_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------- public


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
    """
    check_stack("gelu_taylor", x)
    check_channels("gelu_taylor", "bias", bias, x)
    if approximate not in ("none", "tanh"):
        raise InputError(f"gelu_taylor: approximate must be 'none' or 'tanh', got {approximate!r}")
    if transform_active():
        return gelu_taylor_reference(x, approximate, bias)
    return _gelu_taylor(x, approximate, bias)
