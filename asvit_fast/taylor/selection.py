"""Rules of functions that choose among the numbers of x(0): every derivative follows the choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .linear import _bind
from .value import (
    NotCovered,
    Taylor,
    constant,
    function_name,
    laid_out,
    mapped,
    primals,
    register_rule,
    stacked,
    with_value,
)

# the dimension along which each one chooses, by position, and its default
DIMENSION = {
    "max": (1, None),
    "min": (1, None),
    "median": (1, None),
    "nanmedian": (1, None),
    "mode": (1, -1),
    "sort": (1, -1),
    "topk": (2, -1),
    "kthvalue": (2, -1),
    "cummax": (1, None),
    "cummin": (1, None),
}


@register_rule(*DIMENSION)
def selection(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Values and indices along a dimension, or one value of all, or the larger of two."""
    name = function_name(func)
    position, dim = DIMENSION[name]
    dim = kwargs.get("dim", args[position] if len(args) > position else dim)
    if name in ("max", "min") and (not isinstance(dim, int) or "other" in kwargs):
        if dim is None and "other" not in kwargs:
            return _extremum(func, args, kwargs)
        return _larger_of_two(torch.maximum if name == "max" else torch.minimum, args, kwargs)
    x = args[0]
    if name == "sort" and isinstance(dim, bool):  # sort(descending) does not exist, sort(stable=...) has no position
        raise NotCovered
    if dim is None:
        return _extremum(func, args, kwargs)
    result = func(*primals(args), **primals(kwargs))
    index = result[1]
    if x.dim() == 0:
        return type(result)((Taylor(x.coefficients.clone()), index))
    dim = dim if dim < 0 else dim - x.dim()
    dropped = index.dim() != x.dim()
    whole = index.unsqueeze(dim) if dropped else index
    chosen = x.coefficients.gather(dim, whole.expand(x.order + 1, *whole.shape))
    return type(result)((Taylor(laid_out(chosen.squeeze(dim) if dropped else chosen, result[0])), index))


@register_rule("amax", "amin")
def extrema(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _extremum(func, args, kwargs)


def _extremum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """One number of many; where several are equal, the mean of their derivatives, as torch has it."""
    x, dim, keepdim = _bind(args, kwargs, input=None, dim=None, keepdim=False)
    if not x.numel():
        raise NotCovered
    if x.dim() == 0:
        return Taylor(x.coefficients.clone())
    value = func(x.primal, *args[1:], **kwargs)
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    dims = [d if d < 0 else d - x.dim() for d in dims]
    whole = value.reshape([1 if d - x.dim() in dims else size for d, size in enumerate(x.shape)])
    equal = (x.primal == whole) | (x.primal.isnan() & whole.isnan())
    mean = equal.sum(dims, keepdim=keepdim)
    higher = x.coefficients[1:].masked_fill(~equal, 0).sum(dims, keepdim=keepdim) / mean
    return with_value(value, higher)


@register_rule("maximum", "minimum")
def _larger_of_two(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Maximum and minimum of two tensors; at equal elements the mean of their derivatives, as in torch."""
    a, b = _bind(args, kwargs, input=None, other=None)
    like = a if isinstance(a, Taylor) else b
    a, b = (x if isinstance(x, Taylor) else constant(x, like) for x in (a, b))
    value = func(a.primal, b.primal)
    from_a, from_b = a.primal == value, b.primal == value
    orders = [value]
    for x, y in zip(a.coefficients[1:], b.coefficients[1:], strict=True):
        orders.append(torch.where(from_a & from_b, (x + y) / 2, torch.where(from_a, x, y)))
    return stacked([order.to(value.dtype) for order in orders])


@register_rule("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Indices of x(0) into its flattened image, then a gather."""
    spatial = int(function_name(func)[-2])
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
    value, index = pool(*primals(args), **{**kwargs, "return_indices": True})
    flat = args[0].flatten(-spatial)
    gathered = mapped(torch.gather, (flat, -1, index.flatten(-spatial)), {})
    return Taylor(laid_out(gathered.reshape(index.shape).coefficients, value))
