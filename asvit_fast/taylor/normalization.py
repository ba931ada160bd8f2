"""Rules of softmax and of normalisations (LayerNorm, RMSNorm, GroupNorm, BatchNorm in evaluation, F.normalize).

torch's own second-order forward mode through its fused LayerNorm and BatchNorm is wrong (pytorch/pytorch#196700), so
these are written out, in ``ops.layer_norm_taylor`` and ``ops.softmax_taylor``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.layer_norm_taylor import layer_norm_taylor, unit_scale
from ..ops.softmax_taylor import centred, softmax_taylor
from .linear import _bind
from .value import Taylor, TaylorError, register_rule


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
    if len(shape) == 1:
        return Taylor(layer_norm_taylor(x.coefficients, weight, bias, eps))
    c = x.coefficients  # [orders, *batch, *shape]
    weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    return Taylor(layer_norm_taylor(c.flatten(-len(shape)), weight, bias, eps).reshape(c.shape))


@register_rule("rms_norm")
def rms_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, shape, weight, eps = _bind(args, kwargs, input=None, normalized_shape=None, weight=None, eps=None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(unit_scale(x.coefficients, tuple(range(-len(shape), 0)), eps), weight, None)


@register_rule("group_norm")
def group_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, groups, weight, bias, eps = _bind(args, kwargs, input=None, num_groups=None, weight=None, bias=None, eps=1e-5)
    c = x.coefficients  # [orders, B, C, *space]
    y = layer_norm_taylor(c.reshape(*c.shape[:2], groups, -1), eps=eps).reshape(c.shape)
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
    return Taylor(torch.where(long, unit_scale(c, (dim,), 0.0, total=True), c / eps))


@register_rule("softmax")
def softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    s, dim = _logits(args, kwargs)
    return Taylor(softmax_taylor(s).movedim(-1, dim))


@register_rule("log_softmax")
def log_softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """(log p)' = s' - <s'>, (log p)'' = s'' - <s''> - <(s' - <s'>)^2>, <> the mean under p."""
    s, dim = _logits(args, kwargs)
    p = torch.softmax(s[0], -1)
    first = centred(s[1], p)
    orders = [torch.log_softmax(s[0], -1), first]
    if len(s) == 3:
        orders.append(centred(s[2], p) - (p * first * first).sum(-1, keepdim=True))
    return Taylor(torch.stack(orders).movedim(-1, dim))


def _logits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """Logits [orders, ..., N] in the requested dtype, what is summed over moved last, and where that was (negative)."""
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:
        raise TaylorError("softmax needs its dim")
    s = x.coefficients if kwargs.get("dtype") is None else x.coefficients.to(kwargs["dtype"])
    dim = dim if dim < 0 else dim - x.dim()
    return s.movedim(dim, -1), dim
