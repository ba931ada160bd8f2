"""Rules of functions of one number: y' = f'(x) x', y'' = f'(x) x'' + f''(x) x'^2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.gelu_taylor import gelu_taylor
from ..ops.stacked import chain_rule
from ..ops.tanh_taylor import tanh_taylor
from .linear import _bind
from .value import Taylor, register_rule

Derivatives = tuple[Tensor, Tensor, Tensor | None]  # f, f', f'' at x(0); None where f'' = 0


def compose(x: Taylor, derivatives: Derivatives) -> Taylor:
    """The chain rule for f(x(t))."""
    return Taylor(chain_rule(x.coefficients, *derivatives))


def _exp(x: Tensor) -> Derivatives:
    y = torch.exp(x)
    return y, y, y


def _sigmoid(x: Tensor) -> Derivatives:
    y = torch.sigmoid(x)
    first = y * (1 - y)
    return y, first, first * (1 - 2 * y)


def _silu(x: Tensor) -> Derivatives:
    s, ds, dds = _sigmoid(x)
    return x * s, s + x * ds, 2 * ds + x * dds  # type: ignore[operator]


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    s, ds, _ = _sigmoid(beta * x)
    return F.softplus(x, beta, threshold), s, beta * ds


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Derivatives:
    return F.leaky_relu(x, negative_slope), torch.where(x > 0, 1.0, negative_slope).to(x.dtype), None


def _relu(x: Tensor) -> Derivatives:
    return torch.relu(x), (x > 0).to(x.dtype), None


def _relu6(x: Tensor) -> Derivatives:
    return F.relu6(x), ((x > 0) & (x < 6)).to(x.dtype), None


def _hardsigmoid(x: Tensor) -> Derivatives:
    return F.hardsigmoid(x), ((x > -3) & (x < 3)).to(x.dtype) / 6, None


def _hardswish(x: Tensor) -> Derivatives:
    inside = ((x > -3) & (x < 3)).to(x.dtype)
    return F.hardswish(x), torch.where(x >= 3, 1.0, inside * (2 * x + 3) / 6), inside / 3


def _elu(x: Tensor, alpha: float = 1.0) -> Derivatives:
    negative = torch.where(x > 0, 0.0, alpha * torch.exp(torch.clamp(x, max=0)))
    return F.elu(x, alpha), torch.where(x > 0, 1.0, negative), negative


def _sqrt(x: Tensor) -> Derivatives:
    y = torch.sqrt(x)
    return y, 0.5 / y, -0.25 / (y * x)


def _rsqrt(x: Tensor) -> Derivatives:
    y = torch.rsqrt(x)
    return y, -0.5 * y**3, 0.75 * y**5


def _reciprocal(x: Tensor) -> Derivatives:
    y = torch.reciprocal(x)
    return y, -(y**2), 2 * y**3


def _log(x: Tensor) -> Derivatives:
    return torch.log(x), 1 / x, -1 / (x * x)


def _square(x: Tensor) -> Derivatives:
    return x * x, 2 * x, torch.full_like(x, 2.0)


def _erf(x: Tensor) -> Derivatives:
    first = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    return torch.erf(x), first, -2 * x * first


def _mish(x: Tensor) -> Derivatives:
    inner = compose(Taylor(torch.stack([x, torch.ones_like(x), torch.zeros_like(x)])), _softplus(x))
    t = tanh_taylor(inner.coefficients)  # tanh(softplus(x)) and its derivatives
    return x * t[0], t[0] + x * t[1], 2 * t[1] + x * t[2]


FUNCTIONS: dict[str, Callable[..., Derivatives]] = {
    "exp": _exp,
    "expm1": lambda x: (torch.expm1(x), torch.exp(x), torch.exp(x)),
    "log": _log,
    "log1p": lambda x: (torch.log1p(x), 1 / (1 + x), -1 / (1 + x) ** 2),
    "sin": lambda x: (torch.sin(x), torch.cos(x), -torch.sin(x)),
    "cos": lambda x: (torch.cos(x), -torch.sin(x), -torch.cos(x)),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "mish": _mish,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "relu6": _relu6,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "elu": _elu,
    "erf": _erf,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "square": _square,
    "abs": lambda x: (torch.abs(x), torch.sign(x), None),
}


def _rule(name: str, derivatives: Callable[..., Derivatives]) -> None:
    @register_rule(name)
    def elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
        x = args[0] if args else kwargs.pop("input")
        return compose(x, derivatives(x.primal, *args[1:], **kwargs))


for _name, _derivatives in FUNCTIONS.items():
    _rule(_name, _derivatives)


@register_rule("tanh")
def tanh(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    (x,) = _bind(args, kwargs, input=None)
    return Taylor(tanh_taylor(x.coefficients))


@register_rule("gelu")
def gelu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, approximate = _bind(args, kwargs, input=None, approximate="none")
    coefficients, bias = x.apart()  # a Linear's bias is added on the way
    return Taylor(gelu_taylor(coefficients, approximate, bias))


@register_rule("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def clamp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x = args[0]
    value = func(x.primal, *args[1:], **kwargs)
    return compose(x, (value, (value == x.primal).to(value.dtype), None))


@register_rule("pow", "rpow", "float_power")
def power(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, exponent = args[:2]
    if not isinstance(exponent, Taylor):
        x, n = base.primal, exponent
        return compose(base, (x**n, n * x ** (n - 1), n * (n - 1) * x ** (n - 2)))
    if not isinstance(base, Taylor):
        base = torch.as_tensor(base).to(exponent.primal)
    return (exponent * base.log()).exp()
