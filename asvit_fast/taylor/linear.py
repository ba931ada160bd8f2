"""Rules of functions that are linear (or affine) in what moves, and of questions that only x(0) answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .value import Taylor, TaylorError, constant, function_name, mapped, primals, register_rule, taylors

QUESTIONS = """
    shape size dim ndim ndimension dtype device layout numel nelement stride is_contiguous storage_offset element_size
    get_device is_floating_point is_complex is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested
    is_leaf requires_grad grad_fn is_same_size is_signed is_inference data_ptr names has_names is_mkldnn is_sparse_csr
    itemsize nbytes new_zeros new_ones new_empty new_full new_tensor zeros_like ones_like empty_like full_like rand_like
    randn_like lt le gt ge eq ne less less_equal greater greater_equal isnan isinf isfinite isclose allclose equal
    argmax argmin argsort sign logical_not logical_and logical_or bool int long floor ceil round trunc
"""

LINEAR = """
    view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT
    adjoint squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone detach unbind
    chunk split tensor_split split_with_sizes hsplit vsplit narrow select index_select gather take_along_dim getitem
    roll flip fliplr flipud rot90 mean sum nansum cumsum diff neg negative positive to type type_as float double half
    bfloat16 cpu cuda unfold fold diagonal triu tril trace pixel_shuffle pixel_unshuffle channel_shuffle identity
    dropout dropout1d dropout2d dropout3d feature_dropout real
"""


@register_rule(*QUESTIONS.split())
def question(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answered for x(0); what comes out does not move."""
    return func(*primals(args), **primals(kwargs))


@register_rule(*LINEAR.split())
def linear_map(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(x)' = f(x'): one batched call on the stacked orders."""
    return mapped(func, args, kwargs)


@register_rule(*(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)), "interpolate", "upsample")
def pooling(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear functions of a batch of images, the orders as more images: vmap would run some of them one by one."""
    x = args[0] if args else kwargs.pop("input")
    unbatched = function_name(func)[-2:] in ("1d", "2d", "3d") and x.dim() == 1 + int(function_name(func)[-2])
    if unbatched:
        return mapped(func, (x, *args[1:]), kwargs)
    out = func(x.coefficients.flatten(0, 1), *args[1:], **kwargs)
    return Taylor(out.unflatten(0, (x.order + 1, -1)))


@register_rule("setitem")
def write(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """x[index] = value, into the memory of every order; a constant's derivatives are zero."""
    x, index, value = args
    if not isinstance(x, Taylor):
        raise TaylorError(
            "a Taylor value cannot be written into an ordinary tensor; build it with torch.cat or torch.stack"
        )
    for order, target in enumerate(x.coefficients):
        moving = isinstance(value, Taylor)
        target[index] = value.coefficients[order] if moving else (value if order == 0 else 0.0)


@register_rule("copy_", "fill_", "zero_")
def overwrite(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, value = args[0], args[1] if len(args) > 1 else 0.0
    write(func, (x, ..., value), {})
    return x


@register_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "lerp")
def joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in all parts together: constants among them join with derivatives zero."""
    like = taylors(args, kwargs)[0]

    def promote(value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        moves = (isinstance(value, Tensor) and value.dtype != torch.bool) or (
            is_number and function_name(func) == "where"
        )
        return constant(value, like) if moves else value

    if function_name(func) == "where":  # where(condition, a, b), or the method a.where(condition, b)
        if isinstance(args[0], Taylor):
            args = (args[1], args[0], *args[2:])
        return mapped(torch.where, (args[0], *map(promote, args[1:])), kwargs)
    if function_name(func) == "lerp":
        start, end, weight = args
        return start + weight * (end - start)
    parts = [promote(part) for part in args[0]]
    return mapped(func, (parts, *args[1:]), kwargs)


@register_rule("add", "sub", "subtract", "rsub")
def sum_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Sums and differences: derivatives of constants vanish."""
    left, right = args[:2]
    if isinstance(left, Taylor) and isinstance(right, Taylor):
        return mapped(func, args, kwargs)
    value = func(*primals(args), **kwargs)  # [*shape]
    alpha = kwargs.get("alpha", 1)
    of_left, of_right = {"add": (1, alpha), "rsub": (-alpha, 1)}.get(function_name(func), (1, -alpha))
    moving, factor = (left, of_left) if isinstance(left, Taylor) else (right, of_right)
    higher = moving.coefficients[1:]  # [order, *shape of the moving operand]
    if higher.shape[1:] != value.shape:
        padded = higher.reshape(higher.shape[0], *[1] * (value.dim() - higher.dim() + 1), *higher.shape[1:])
        higher = padded.expand(-1, *value.shape)
    higher = higher.to(value.dtype) if factor == 1 else higher.to(value.dtype) * factor
    return Taylor(torch.cat([value.unsqueeze(0), higher]))


@register_rule("pad")
def pad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Linear, but for a constant other than zero, which only x(0) shows."""
    x, widths, mode, value = _bind(args, kwargs, input=None, pad=None, mode="constant", value=None)
    if mode != "constant" or not value:
        return mapped(F.pad, (x, widths, mode), {})
    first = F.pad(x.primal, widths, mode, value).unsqueeze(0)
    return Taylor(torch.cat([first, mapped(F.pad, (x, widths), {}).coefficients[1:]]))


@register_rule("masked_fill")
def masked_fill(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, mask, value = _bind(args, kwargs, self=None, mask=None, value=None)
    return joined(torch.where, (mask, value, x), {})


@register_rule("max", "min", "sort", "topk", "kthvalue", "median", "amax", "amin", "max_pool2d", "max_pool1d")
def selection(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Order statistics: x(0) chooses, every derivative follows the choice."""
    name, x = function_name(func), args[0]
    if name.startswith("max_pool"):
        return _max_pool(func, args, kwargs)
    if (
        name in ("amax", "amin")
        or len(taylors(args, kwargs)) > 1
        or (len(args) == 1 and not kwargs and name in ("max", "min"))
    ):
        return _extremum(name, args, kwargs)
    result = func(*primals(args), **kwargs)
    dim = kwargs.get("dim", next((a for a in args[1 if name in ("max", "min", "sort", "median") else 2 :]), -1))
    values = mapped(torch.gather, (x, dim, result[1] if result[1].dim() == x.dim() else result[1].unsqueeze(dim)), {})
    if result[1].dim() != x.dim():
        values = values.squeeze(dim)
    return type(result)((values, result[1])) if not hasattr(result, "_fields") else (values, result[1])


def _extremum(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x = args[0]
    larger = name in ("max", "amax")
    if name in ("max", "min") and len(args) == 2:  # elementwise maximum of two
        other = args[1] if isinstance(args[1], Taylor) else constant(args[1], x)
        return joined(torch.where, ((x > other) if larger else (x < other), x, other), {})
    if name in ("max", "min"):
        flat = x.flatten()
        index = flat.primal.argmax() if larger else flat.primal.argmin()
        return flat[index]
    dim, keepdim = _bind(args[1:], kwargs, dim=(), keepdim=False)
    if not isinstance(dim, int):
        raise TaylorError(f"no Taylor rule for {name} over several dimensions; reduce one after the other")
    index = x.primal.argmax(dim, keepdim=True) if larger else x.primal.argmin(dim, keepdim=True)
    values = mapped(torch.gather, (x, dim, index), {})
    return values if keepdim else values.squeeze(dim)


def _max_pool(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Indices of x(0) into its flattened image, then a gather."""
    kwargs = {**kwargs, "return_indices": True}
    spatial = 2 if "2d" in function_name(func) else 1
    pool = F.max_pool2d if spatial == 2 else F.max_pool1d
    _, index = pool(*primals(args), **kwargs)
    flat = args[0].flatten(-spatial)
    gathered = mapped(torch.gather, (flat, -1, index.flatten(-spatial)), {})
    return gathered.reshape(index.shape)


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Arguments by position or name, in the order of ``defaults``."""
    values = {
        **defaults,
        **dict(zip(defaults, args, strict=False)),
        **{k: v for k, v in kwargs.items() if k in defaults},
    }
    return list(values.values())
