"""Rules of functions of one number: y' = f'(x) x', y'' = f'(x) x'' + f''(x) x'^2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.gelu_taylor import gelu_taylor
from ..ops.square_taylor import square_taylor
from ..ops.tanh_taylor import tanh_taylor
from ..ops.taylor_utils import chain_rule
from .linear import _bind
from .value import NotCovered, Taylor, function_name, laid_out, primals, register_rule, stacked, taylors, with_value

Derivatives = tuple[Tensor, Tensor, Tensor | None]  # f, f', f'' at x(0); None where f'' = 0


def compose(x: Taylor, derivatives: Derivatives) -> Taylor:
    """The chain rule for f(x(t))."""
    return Taylor(laid_out(chain_rule(x.coefficients, *derivatives), derivatives[0]))


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
    straight = beta * x > threshold
    return F.softplus(x, beta, threshold), s.masked_fill(straight, 1.0), (beta * ds).masked_fill(straight, 0.0)


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


def _rsqrt(x: Tensor) -> Derivatives:
    y = torch.rsqrt(x)
    return y, -0.5 * y**3, 0.75 * y**5


def _reciprocal(x: Tensor) -> Derivatives:
    y = torch.reciprocal(x)
    return y, -(y**2), 2 * y**3


def _log(x: Tensor) -> Derivatives:
    return torch.log(x), 1 / x, -1 / (x * x)


def _erf(x: Tensor) -> Derivatives:
    first = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    return torch.erf(x), first, -2 * x * first


def _sinc(x: Tensor) -> Derivatives:
    """f = sin(z)/z, z = pi x: f' = (cos z - f)/z, f'' = -f - 2 f'/z, and their series where z is small."""
    z = math.pi * x
    small = z.abs() < 0.5
    far = torch.where(small, 1.0, z)
    f = torch.sinc(x)
    first = (far.cos() - f) / far
    second = -f - 2 * first / far
    near_first, near_second = torch.zeros_like(z), torch.zeros_like(z)
    for n in range(8, 0, -1):  # f = sum over n of (-1)^n z^2n / (2n + 1)!
        term = (-1) ** n * 2 * n / math.factorial(2 * n + 1)
        near_first = near_first * z * z + term
        near_second = near_second * z * z + term * (2 * n - 1)
    return f, math.pi * torch.where(small, z * near_first, first), math.pi**2 * torch.where(small, near_second, second)


def _mish(x: Tensor) -> Derivatives:
    inner = compose(Taylor(torch.stack([x, torch.ones_like(x), torch.zeros_like(x)])), _softplus(x))
    t = tanh_taylor(inner.coefficients)  # tanh(softplus(x)) and its derivatives
    return x * t[0], t[0] + x * t[1], 2 * t[1] + x * t[2]


FUNCTIONS: dict[str, Callable[..., Derivatives]] = {
    "exp": _exp,
    "exp2": lambda x: (y := torch.exp2(x), y * math.log(2), y * math.log(2) ** 2),
    "expm1": lambda x: (torch.expm1(x), torch.exp(x), torch.exp(x)),
    "log": _log,
    "log1p": lambda x: (torch.log1p(x), 1 / (1 + x), -1 / (1 + x) ** 2),
    "sin": lambda x: (torch.sin(x), torch.cos(x), -torch.sin(x)),
    "cos": lambda x: (torch.cos(x), -torch.sin(x), -torch.cos(x)),
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "mish": _mish,
    "sinc": _sinc,
    "special_sinc": _sinc,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "relu6": _relu6,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "elu": _elu,
    "erf": _erf,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "abs": lambda x: (torch.abs(x), torch.sign(x), None),  # not of complex numbers: torch.sign refuses them
    "absolute": lambda x: (torch.abs(x), torch.sign(x), None),
}


def _rule(name: str, derivatives: Callable[..., Derivatives]) -> None:
    @register_rule(name)
    def elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
        if taylors(args[1:], kwargs):
            raise NotCovered
        return compose(args[0], derivatives(args[0].primal, *args[1:], **kwargs))


for _name, _derivatives in FUNCTIONS.items():
    _rule(_name, _derivatives)


def _same_layout(x: Taylor) -> Tensor:
    """A tensor without memory that lies as torch's elementwise functions of ``x`` do."""
    like = x.split_bias()[0][0]
    return like if like.is_contiguous() else torch.empty_like(like, device="meta")


@register_rule("tanh")
def tanh(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    (x,) = _bind(args, kwargs, input=None)
    return Taylor(laid_out(tanh_taylor(x.coefficients), _same_layout(x)))


@register_rule("square")
def square(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    (x,) = _bind(args, kwargs, input=None)
    if not x.is_floating_point():  # complex
        return compose(x, (x.primal * x.primal, 2 * x.primal, torch.full_like(x.primal, 2.0)))
    return Taylor(laid_out(square_taylor(x.coefficients), _same_layout(x)))


@register_rule("gelu")
def gelu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, approximate = _bind(args, kwargs, input=None, approximate="none")
    coefficients, bias = x.split_bias()  # a Linear's bias is added on the way
    return Taylor(laid_out(gelu_taylor(coefficients, approximate, bias), _same_layout(x)))


@register_rule("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def clamp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x = args[0]
    if taylors(args[1:], kwargs):  # bounds that move
        raise NotCovered
    value = func(x.primal, *args[1:], **kwargs)
    follows = value == x.primal
    if function_name(func) == "hardtanh":  # torch lets it stand still at its ends already
        low, high = _bind(args[1:], kwargs, min_val=-1.0, max_val=1.0)
        follows = (x.primal > low) & (x.primal < high)
    if value.shape != x.shape:
        raise NotCovered
    return compose(x, (value, follows.to(value.dtype), None))


@register_rule("nan_to_num")
def nan_to_num(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Derivatives of replaced elements are zero, even where they were not finite."""
    x, *rest = args
    if x.is_complex() or taylors(rest, kwargs):
        raise NotCovered
    higher = x.coefficients[1:].masked_fill(~x.primal.isfinite(), 0.0)
    return with_value(func(x.primal, *rest, **kwargs), higher)


def _times(factor: Any, derivative: Tensor) -> Tensor:
    """factor * derivative, where 0 times infinity is 0: nothing moves."""
    return torch.where(derivative == 0, 0.0, factor * derivative).to(derivative.dtype)


@register_rule("sqrt")
def square_root(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    (x,) = _bind(args, kwargs, input=None)
    c = x.coefficients
    y = torch.sqrt(c[0])
    orders = [y, _times(0.5 / y, c[1])]
    if x.order == 2:
        orders.append(_times(0.5 / y, c[2]) - _times(0.25 / (y * c[0]), c[1] * c[1]))
    return stacked(orders)


@register_rule("pow", "rpow", "float_power")
def power(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """b^e, whichever moves. A factor e or e - 1 that is 0 ends the powers of b, whatever b^(e - 1) is at 0."""
    base, exponent = _bind(args, kwargs, input=None, exponent=None)
    if func is Tensor.__rpow__:
        base, exponent = exponent, base
    if isinstance(exponent, (int, float)) and exponent == 2 and function_name(func) == "pow":
        return square(torch.square, (base,), {})
    value = torch.pow(*primals((base, exponent)))
    if function_name(func) == "float_power":
        value = torch.float_power(*primals((base, exponent)))
    b, e = primals((base, exponent))
    b = torch.as_tensor(b, dtype=value.dtype, device=value.device)
    if not isinstance(base, Taylor):
        return _exponential(value, b, exponent)
    if isinstance(exponent, Taylor):
        raise NotCovered
    moving = base.coefficients[1:].to(value.dtype)

    def falling(factor: Any, left: Any) -> Tensor:
        """factor * b^left, which is 0 where factor is."""
        return torch.where(torch.as_tensor(factor, device=b.device) == 0, 0.0, factor * torch.pow(b, left))

    first = falling(e, e - 1)
    orders = [value, _times(first, moving[0]).expand(value.shape)]
    if base.order == 2:
        second = _times(falling(e * (e - 1), e - 2), moving[0] * moving[0])
        orders.append((_times(first, moving[1]) + second).expand(value.shape))
    return stacked([order.to(value.dtype) for order in orders])


def _exponential(value: Tensor, base: Tensor, exponent: Taylor) -> Taylor:
    """base^e(t) with ``value`` at 0: 0^e stays 0, or 1 where e is 0."""
    moving = exponent.coefficients[1:].to(value.dtype)
    log = torch.log(base)
    first = torch.where((base == 0) & (exponent.primal.real >= 0), 0.0, value * log)
    orders = [value, _times(first, moving[0]).expand(value.shape)]
    if exponent.order == 2:
        second = torch.where(first == 0, 0.0, first * log)
        orders.append((_times(first, moving[1]) + _times(second, moving[0] * moving[0])).expand(value.shape))
    return stacked(orders)
