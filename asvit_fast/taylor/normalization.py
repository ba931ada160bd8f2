"""Rules of softmax and of normalisations (LayerNorm, RMSNorm, GroupNorm, BatchNorm in evaluation, F.normalize).

torch's own second-order forward mode through its fused LayerNorm and BatchNorm is wrong (pytorch/pytorch#196700), so
these are written out, in ``ops.layer_norm_taylor`` and ``ops.softmax_taylor``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.layer_norm_taylor import layer_norm_taylor, unit_scale
from ..ops.softmax_taylor import softmax_taylor, subtract_weighted_mean
from ..ops.taylor_utils import compute_dtype
from .linear import _bind
from .value import NotCovered, Taylor, TaylorError, function_name, laid_out, primals, register_rule, taylors


def _unmoved(*parameters: Any) -> None:
    """The rules below let the input alone move."""
    if taylors(parameters):
        raise NotCovered


def _affine(y: Tensor, weight: Any, bias: Any) -> Taylor:
    """y [orders, *shape] times weight, plus bias on the value."""
    if weight is not None:
        y = y * weight
    if bias is not None:
        y[0].add_(bias)  # in place: y is fresh memory
    return Taylor(y)


def _image_layout(y: Tensor, x: Taylor) -> Tensor:
    """y [orders, *shape] as torch's norms lay it out: channels last where x(0) is, contiguous otherwise."""
    like = x.primal
    if like.is_contiguous():
        return y.contiguous()
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == dims and like.is_contiguous(memory_format=memory_format):
            return laid_out(y, like)
    return y.contiguous()


@register_rule("layer_norm")
def layer_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, shape, weight, bias, eps, _ = _bind(
        args, kwargs, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5, cudnn_enable=True
    )
    _unmoved(weight, bias, eps)
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise NotCovered  # torch says what is wrong
    if len(shape) == 1:
        return Taylor(layer_norm_taylor(x.coefficients, weight, bias, eps))
    c = x.coefficients  # [orders, *batch, *shape]
    weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    return Taylor(layer_norm_taylor(c.flatten(-len(shape)), weight, bias, eps).reshape(c.shape))


@register_rule("rms_norm")
def rms_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, shape, weight, eps = _bind(args, kwargs, input=None, normalized_shape=None, weight=None, eps=None)
    _unmoved(weight, eps)
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise NotCovered
    dtype = compute_dtype(x.coefficients)
    eps = torch.finfo(dtype).eps if eps is None else eps
    y = unit_scale(x.coefficients.to(dtype), tuple(range(-len(shape), 0)), eps)
    return Taylor(_image_layout((y if weight is None else y * weight).to(x.dtype), x))


@register_rule("group_norm")
def group_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, groups, weight, bias, eps, _ = _bind(
        args, kwargs, input=None, num_groups=None, weight=None, bias=None, eps=1e-5, cudnn_enabled=True
    )
    _unmoved(weight, bias, eps)
    c = x.coefficients  # [orders, B, C, *space]
    if x.shape[1] % groups:
        raise NotCovered
    y = layer_norm_taylor(c.reshape(*c.shape[:2], groups, -1), eps=eps).reshape(c.shape)
    y = _image_layout(y, x)
    channels = (-1, *[1] * (c.dim() - 3))
    return _affine(
        y, None if weight is None else weight.reshape(channels), None if bias is None else bias.reshape(channels)
    )


def _bind_statistics(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **switch: bool
) -> tuple[Taylor, bool, float, dict[str, Any]]:
    """x, the switch, eps and the tensors of a batch or instance norm, which torch's have in another order than F's."""
    names = ["running_mean", "running_var", "weight", "bias"]
    if func in (torch.batch_norm, torch.instance_norm):
        names = names[2:] + names[:2]
    defaults = {"input": None, **dict.fromkeys(names), **switch, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True}
    x, *tensors, is_on, _, eps, _ = _bind(args, kwargs, **defaults)
    arguments = dict(zip(names, tensors, strict=True))
    _unmoved(arguments, eps)
    return x, is_on, eps, arguments


@register_rule("batch_norm")
def batch_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, training, eps, arguments = _bind_statistics(func, args, kwargs, training=False)
    if training and arguments["running_mean"] is not None:
        raise TaylorError("batch_norm would change its running statistics; call model.eval() first")
    if training or arguments["running_mean"] is None:  # one group per channel, all samples in it
        func(x.primal, *primals(args[1:]), **kwargs)  # torch's own word on shapes
        c = x.coefficients.transpose(1, 2)  # [orders, C, B, *space]
        y = layer_norm_taylor(c.flatten(2), eps=eps).reshape(c.shape).transpose(1, 2)
        channels = (-1, *[1] * (x.dim() - 2))
        weight, bias = (None if p is None else p.reshape(channels) for p in (arguments["weight"], arguments["bias"]))
        return _affine(_image_layout(y, x), weight, bias)
    return _with_statistics(x, eps=eps, **arguments)


def _with_statistics(
    x: Taylor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Taylor:
    """Channels of x [B, C, *space] scaled and shifted."""
    shape = (-1, *[1] * (x.dim() - 2))
    scale = torch.rsqrt(running_var + eps) if weight is None else weight * torch.rsqrt(running_var + eps)  # [C]
    offset = -running_mean * scale if bias is None else bias - running_mean * scale  # [C]
    return _affine(_image_layout(x.coefficients * scale.reshape(shape), x), None, offset.reshape(shape))


@register_rule("instance_norm")
def instance_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Each channel of each sample on its own: a group norm of as many groups as channels."""
    x, own_statistics, eps, arguments = _bind_statistics(func, args, kwargs, use_input_stats=True)
    if not own_statistics:
        return _with_statistics(x, eps=eps, **arguments)
    if arguments["running_mean"] is not None:
        raise TaylorError("instance_norm would change its running statistics; call model.eval() first")
    func(x.primal, *primals(args[1:]), **kwargs)  # torch's own word on shapes
    y = group_norm(F.group_norm, (x, x.shape[1], arguments["weight"], arguments["bias"], eps), {})
    return Taylor(y.coefficients.contiguous())


@register_rule("normalize")
def unit_vectors(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """F.normalize: x / max(|x|, eps)."""
    x, p, dim, eps = _bind(args, kwargs, input=None, p=2.0, dim=1, eps=1e-12)
    _unmoved(eps)
    if p != 2.0 or not isinstance(dim, int) or x.dim() == 0:
        raise NotCovered
    dim = dim if dim < 0 else dim - x.dim()
    c = x.coefficients
    long = c[0].square().sum(dim, keepdim=True) > eps * eps
    y = torch.where(long, unit_scale(c, (dim,), 0.0, total=True), c / eps)
    return Taylor(laid_out(y, torch.empty_like(c[0], device="meta")))


@register_rule("softmax")
def softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    s, dim = _logits(func, args, kwargs)
    return Taylor(softmax_taylor(s).movedim(-1, dim).contiguous())


@register_rule("log_softmax")
def log_softmax(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """(log p)' = s' - <s'>, (log p)'' = s'' - <s''> - <(s' - <s'>)^2>, <> the mean under p."""
    s, dim = _logits(func, args, kwargs)
    p = torch.softmax(s[0], -1)
    first = subtract_weighted_mean(s[1], p)
    orders = [torch.log_softmax(s[0], -1), first]
    if len(s) == 3:
        orders.append(subtract_weighted_mean(s[2], p) - (p * first * first).sum(-1, keepdim=True))
    return Taylor(torch.stack(orders).movedim(-1, dim).contiguous())


@register_rule("linalg_vector_norm", "norm", "linalg_norm", "frobenius_norm")
def euclidean_norm(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """y = |x|, u = x / y: y' = <u, x'>, y'' = <u, x''> + (<x', x'> - y'^2) / y; at 0 they are 0, as those of abs."""
    name = function_name(func)
    p: Any
    dtype: Any
    if name == "frobenius_norm":
        x, dim, keepdim = _bind(args, kwargs, input=None, dim=None, keepdim=False)
        p, dtype = 2, None
    elif name == "norm":
        x, p, dim, keepdim, dtype = _bind(args, kwargs, input=None, p="fro", dim=None, keepdim=False, dtype=None)
        p = 2 if p == "fro" or p is None else p
    else:
        default = 2 if name == "linalg_vector_norm" else None
        x, p, dim, keepdim, dtype = _bind(args, kwargs, input=None, ord=default, dim=None, keepdim=False, dtype=None)
        of_matrix = name == "linalg_norm" and (x.dim() == 2 if dim is None else not isinstance(dim, int))
        p = 2 if p is None or (of_matrix and p == "fro") else None if of_matrix else p
    if p != 2 or dtype is not None or x.is_complex() or not x.numel():
        raise NotCovered
    dims: list[int] = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    c = x.coefficients
    y = torch.linalg.vector_norm(c[0], 2, [d % max(x.dim(), 1) for d in dims] or None, keepdim=True)
    u = c[0] / torch.where(y == 0, 1.0, y)
    dims = [d if d < 0 else d - x.dim() for d in dims]

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dims, keepdim=True) if dims else left * right

    orders = [y, product(u, c[1])]
    if x.order == 2:
        speed = c[1] - u * orders[1]  # across u, so that nothing cancels
        bend = torch.where(y == 0, 0.0, product(speed, speed) / y)
        orders.append(product(u, c[2]) + bend)
    return Taylor(torch.stack(orders if keepdim or not dims else [order.squeeze(dims) for order in orders]))


@register_rule("logsumexp")
def logsumexp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """y' = <s'>, y'' = <s''> + <(s' - <s'>)^2>, <> the mean under softmax(s); what is -inf has no part in it."""
    x, dim, keepdim = _bind(args, kwargs, input=None, dim=None, keepdim=False)
    if not x.numel() or x.dim() == 0 or not isinstance(dim, (int, tuple, list)):
        raise NotCovered
    value = torch.logsumexp(x.primal, dim, keepdim=True)
    p = torch.exp(x.primal - value)
    s = x.coefficients[1:].masked_fill(p == 0, 0.0)
    dims = dim if isinstance(dim, int) else tuple(dim)
    first = (p * s[0]).sum(dims, keepdim=True)
    orders = [value, first]
    if x.order == 2:
        orders.append((p * (s[1] + (s[0] - first).square())).sum(dims, keepdim=True))
    return Taylor(torch.stack([order if keepdim else order.squeeze(dims) for order in orders]))


@register_rule("logaddexp")
def logaddexp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = _bind(args, kwargs, input=None, other=None)
    y: Any = torch.stack(torch.broadcast_tensors(a, b)).logsumexp(0)  # a Taylor value
    return Taylor(laid_out(y.coefficients, func(*primals((a, b)))))


def _logits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """Logits [orders, ..., N] in the requested dtype, what is summed over moved last, and where that was (negative)."""
    x, *rest = args
    names = ("dim", "_stacklevel", "dtype") if func in (F.softmax, F.log_softmax) else ("dim", "dtype")
    arguments = {**dict(zip(names, rest, strict=False)), **kwargs}
    dim, dtype = arguments.get("dim"), arguments.get("dtype")
    if not isinstance(dim, int) or x.dim() == 0 or not x.coefficients.numel() or not -x.dim() <= dim < x.dim():
        raise NotCovered
    s = x.coefficients if dtype is None else x.coefficients.to(dtype)
    dim = dim if dim < 0 else dim - x.dim()
    return s.movedim(dim, -1), dim
