"""Rules of softmax and of normalisations (LayerNorm, RMSNorm, GroupNorm, BatchNorm in evaluation, F.normalize).

torch's own second-order forward mode through its fused LayerNorm and BatchNorm is wrong (pytorch/pytorch#196700), so
these are written out: with c = x - <x>, v = <c c>, r = (v + eps)^-1/2, every derivative of r follows from those of v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .linear import _bind
from .value import Taylor, TaylorError, register_rule


def _inverse_root(c: Tensor, dims: tuple[int, ...], eps: float, total: bool = False) -> list[Tensor]:
    """Derivatives of (<c c> + eps)^-1/2, <> the mean (or the sum, if ``total``) over ``dims``: orders x [..., 1]."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True) if total else (a * b).mean(dims, keepdim=True)

    r = torch.rsqrt(product(c[0], c[0]) + eps)
    v1 = 2 * product(c[0], c[1])
    derivatives = [r, -0.5 * r**3 * v1]
    if len(c) == 3:
        v2 = 2 * product(c[1], c[1]) + 2 * product(c[0], c[2])
        derivatives.append(0.75 * r**5 * v1 * v1 - 0.5 * r**3 * v2)
    return derivatives


def _scaled(c: Tensor, r: list[Tensor]) -> Tensor:
    """Derivatives of c r, stacked [orders, *shape]."""
    orders = [c[0] * r[0], c[1] * r[0] + c[0] * r[1]]
    if len(c) == 3:
        orders.append(c[2] * r[0] + 2 * c[1] * r[1] + c[0] * r[2])
    return torch.stack(orders)


def normalize(c: Tensor, dims: tuple[int, ...], eps: float, center: bool = True) -> Tensor:
    """Stacked derivatives [orders, *shape] of (x - <x>) / sqrt(var + eps) over ``dims`` (negative)."""
    if center:
        c = c - c.mean(dims, keepdim=True)
    return _scaled(c, _inverse_root(c, dims, eps))


def _affine(y: Tensor, weight: Any, bias: Any) -> Taylor:
    """y [orders, *shape] times weight, plus bias on the value."""
    if weight is not None:
        y = y * weight
    if bias is not None:
        y[0].add_(bias)  # in place: y is fresh memory
    return Taylor(y)


@register_rule("layer_norm")
def layer_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, shape, weight, bias, eps = _bind(
        args, kwargs, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
    )
    dims = tuple(range(-len(shape), 0))
    return _affine(normalize(x.coefficients, dims, eps), weight, bias)


@register_rule("rms_norm")
def rms_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, shape, weight, eps = _bind(args, kwargs, input=None, normalized_shape=None, weight=None, eps=None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(normalize(x.coefficients, tuple(range(-len(shape), 0)), eps, center=False), weight, None)


@register_rule("group_norm")
def group_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, groups, weight, bias, eps = _bind(args, kwargs, input=None, num_groups=None, weight=None, bias=None, eps=1e-5)
    c = x.coefficients  # [orders, B, C, *space]
    y = normalize(c.reshape(*c.shape[:2], groups, -1), (-1,), eps).reshape(c.shape)
    channels = (-1, *[1] * (c.dim() - 3))
    return _affine(
        y, None if weight is None else weight.reshape(channels), None if bias is None else bias.reshape(channels)
    )


@register_rule("batch_norm")
def batch_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, mean, var, weight, bias, training, _, eps = _bind(
        args,
        kwargs,
        input=None,
        running_mean=None,
        running_var=None,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    )
    if training or mean is None:
        raise TaylorError("batch_norm with batch statistics couples the samples of a batch; call model.eval() first")
    shape = (-1, *[1] * (x.dim() - 2))
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)  # [C]
    offset = -mean * scale if bias is None else bias - mean * scale  # [C]
    return _affine(x.coefficients * scale.reshape(shape), None, offset.reshape(shape))


@register_rule("normalize")
def unit_vectors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """F.normalize: x / max(|x|, eps)."""
    x, p, dim, eps = _bind(args, kwargs, input=None, p=2.0, dim=1, eps=1e-12)
    if p != 2.0:
        raise TaylorError(f"no Taylor rule for normalize with p={p}; only the Euclidean norm has one")
    dim = dim if dim < 0 else dim - x.dim()
    c = x.coefficients
    long = c[0].square().sum(dim, keepdim=True) > eps * eps
    return Taylor(torch.where(long, _scaled(c, _inverse_root(c, (dim,), 0.0, total=True)), c / eps))


@register_rule("softmax")
def softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """p' = p (s' - <s'>), p'' = p (s'' - <s''> + (s' - <s'>)^2 - <(s' - <s'>)^2>), <> the mean under p."""
    s, dim, p = _softmax_parts(args, kwargs)
    first = s[1] - (p * s[1]).sum(dim, keepdim=True)
    orders = [p, p * first]
    if len(s) == 3:
        second = s[2] + first * first
        orders.append(p * (second - (p * second).sum(dim, keepdim=True)))
    return Taylor(torch.stack(orders))


@register_rule("log_softmax")
def log_softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    s, dim, p = _softmax_parts(args, kwargs)
    first = s[1] - (p * s[1]).sum(dim, keepdim=True)
    orders = [torch.log_softmax(s[0], dim), first]
    if len(s) == 3:
        orders.append(s[2] - (p * (s[2] + first * first)).sum(dim, keepdim=True))
    return Taylor(torch.stack(orders))


def _softmax_parts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int, Tensor]:
    """Logits [orders, *shape] (in the requested dtype), the dimension counted from the end, and softmax of x(0)."""
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        raise TaylorError("softmax needs its dim")
    s = x.coefficients if kwargs.get("dtype") is None else x.coefficients.to(kwargs["dtype"])
    dim = dim if dim < 0 else dim - x.dim()
    return s, dim, torch.softmax(s[0], dim)
