"""Rules of functions that are linear (or affine) in what moves, and of questions that only x(0) answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .value import (
    NotCovered,
    Taylor,
    TaylorError,
    constant,
    function_name,
    laid_out,
    laid_out_by,
    mapped,
    moving,
    primals,
    register_rule,
    stacked,
    taylors,
    with_value,
)

# what comes out does not move: sizes and the like, truth values, indices, and steps between which nothing changes
METADATA_FUNCTIONS = """
    shape size dim ndim ndimension dtype device layout numel nelement stride is_contiguous storage_offset element_size
    get_device is_floating_point is_complex is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested
    is_leaf requires_grad grad_fn grad is_same_size is_signed is_inference data_ptr names has_names is_mkldnn
    is_sparse_csr itemsize nbytes is_conj is_neg new_zeros new_ones new_empty zeros_like ones_like
    empty_like rand_like randn_like randint_like lt le gt ge eq ne less less_equal greater greater_equal isnan
    isinf isfinite isclose allclose equal argmax argmin argsort sign logical_not logical_and logical_or bool int long
    floor ceil round trunc fix floor_divide floordiv histc contains rfloordiv
"""

LINEAR = """
    view reshape flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT H mH
    adjoint squeeze unsqueeze expand broadcast_to repeat repeat_interleave tile contiguous clone detach unbind
    chunk split tensor_split split_with_sizes hsplit vsplit narrow select index_select gather take_along_dim getitem
    flip fliplr flipud rot90 mean sum cumsum neg negative positive pos float double half
    bfloat16 cpu cuda unfold fold diagonal triu tril trace pixel_shuffle pixel_unshuffle channel_shuffle identity
    dropout dropout1d dropout2d dropout3d feature_dropout real imag view_as_real view_as_complex conj conj_physical
    resolve_conj resolve_neg
"""


JOINTLY_LINEAR = """
    scatter scatter_add index_add index_copy index_put index_fill put masked_scatter slice_scatter select_scatter
    diagonal_scatter max_unpool1d max_unpool2d max_unpool3d
"""


@register_rule(*METADATA_FUNCTIONS.split())
def question(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answered for x(0); what comes out does not move."""
    return func(*primals(args), **primals(kwargs))


@register_rule("full_like", "new_full")
def filled(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor of one number, which may move."""
    value = func(*primals(args), **primals(kwargs))
    place = 1 if function_name(func) == "full_like" else 2
    number = kwargs.get("fill_value", args[place] if len(args) > place else None)
    if not isinstance(number, Taylor):
        return value
    orders = number.coefficients.reshape(-1, *[1] * value.dim()).expand(-1, *value.shape)
    return moving(laid_out(orders.to(value.dtype, copy=True), value))


@register_rule("new_tensor")
def new_tensor(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for number in taylors(args[1:], kwargs):
        number.item()  # refused
    return func(*primals(args), **kwargs)


@register_rule("requires_grad_")
def already_in_the_graph(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


@register_rule(*LINEAR.split())
def linear_map(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(x)' = f(x'): one batched call on the stacked orders."""
    return mapped(func, args, kwargs)


@register_rule("roll")
def roll(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = mapped(func, args, kwargs)
    if primals(args[0]).is_contiguous():
        return result
    return Taylor(laid_out(result.coefficients, func(*primals(args), **kwargs)))


@register_rule("data")
def data(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].detach()


@register_rule("view_as", "reshape_as", "expand_as", "type_as", "to", "type", "sum_to_size")
def shaped_as(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in the first tensor; of the second, only shape and dtype count."""
    return mapped(func, (args[0], *primals(args[1:])), primals(kwargs))


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
            "__setitem__ writes a moving tensor into an ordinary one, which cannot hold derivatives; "
            "build it with torch.cat, torch.stack or torch.where"
        )
    index = primals(index)
    for order, target in enumerate(x.coefficients):
        moving = isinstance(value, Taylor)
        target[index] = value.coefficients[order] if moving else (value if order == 0 else 0.0)


@register_rule("copy_", "fill_", "zero_")
def overwrite(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *values = args
    value = values[0] if values else next((kwargs[name] for name in ("src", "value", "other") if name in kwargs), 0.0)
    if not isinstance(x, Taylor):
        raise TaylorError(
            f"{function_name(func)} writes a moving tensor into an ordinary one, which cannot hold derivatives; "
            "build it with torch.cat, torch.stack or torch.where"
        )
    write(func, (x, ..., value), {})
    return x


@register_rule(*JOINTLY_LINEAR.split())
def jointly_linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in all tensors together, a constant's derivatives being zero. Order by order, so that where indices repeat
    each order takes the same one: torch's backward pass takes all of them."""
    name = function_name(func)
    if "reduce" in kwargs or (name in ("scatter", "index_fill") and len(args) > 4):
        raise NotCovered
    number = 3 if name in ("scatter", "index_fill") and "value" not in kwargs else None  # a value to write

    def of_order(k: int) -> Any:
        def part(value: Any) -> Any:
            if isinstance(value, Taylor):
                return value.coefficients[k]
            numbers = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            return torch.zeros_like(value) if k and numbers else value

        leaves = pytree.tree_map(part, (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Taylor))
        given, named = list(leaves[0]), dict(leaves[1])
        if k and "value" in named:
            named["value"] = 0.0 if not isinstance(named["value"], Tensor) else named["value"]
        if k and number is not None and len(given) > number and not isinstance(given[number], Tensor):
            given[number] = 0.0
        return func(*given, **named)

    order = taylors(args, kwargs)[0].order
    return stacked([of_order(k) for k in range(order + 1)])


@register_rule("embedding")
def embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a weight [V, C] that moves; that of ``padding_idx``, which only has no gradient, as well."""
    indices, weight = (*args, *(kwargs[name] for name in ("weight", "indices") if name in kwargs))[:2]
    max_norm = kwargs.get("max_norm", args[3] if func is F.embedding and len(args) > 3 else None)
    if max_norm is not None:
        raise TaylorError("embedding with max_norm changes its weight on the way; normalize the weight before")
    indices, weight = (weight, indices) if isinstance(indices, Taylor) else (indices, weight)
    return Taylor(weight.coefficients[:, indices])


@register_rule("heaviside")
def heaviside(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, values = _bind(args, kwargs, input=None, values=None)
    steps = torch.heaviside(*primals((x, values)))
    return where(torch.where, (primals(x) == 0, values, steps), {}) if isinstance(values, Taylor) else steps


@register_rule("broadcast_tensors", "meshgrid", "block_diag")
def side_by_side(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in all tensors together, given one by one or in a list."""
    like = taylors(args)[0]
    parts = args[0] if isinstance(args[0], (list, tuple)) else args
    parts = [part if isinstance(part, Taylor) else _promoted(part, like) for part in parts]
    return mapped(func, tuple(parts), kwargs)


def _promoted(value: Any, like: Taylor) -> Any:
    """A constant that joins Taylor values, with derivatives zero."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.dim():
        return constant(value, like)
    return constant(torch.as_tensor(value).to(torch.result_type(like.primal, value)), like)


@register_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack")
def joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in all parts together: constants among them join with derivatives zero."""
    if not args:
        kwargs = dict(kwargs)
        args = (kwargs.pop("tensors"),)
    if not isinstance(args[0], (list, tuple)):
        raise TypeError(f"{function_name(func)}(): the tensors must be a list or tuple, not a single tensor")
    like = taylors(args)[0]
    parts = [part if isinstance(part, Taylor) else _promoted(part, like) for part in args[0]]
    return laid_out_by(func, args, kwargs, mapped(func, (parts, *args[1:]), kwargs))


@register_rule("where")
def where(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """where(condition, a, b), or the method a.where(condition, b)."""
    if func is torch.where:
        condition, first, second = _bind(args, kwargs, condition=None, input=None, other=None)
    else:
        first, condition, second = _bind(args, kwargs, self=None, condition=None, other=None)
    if isinstance(condition, Taylor) or second is None:  # where(x): the indices of what is not zero
        raise NotCovered
    like = taylors(first, second)[0]
    first, second = (value if isinstance(value, Taylor) else _promoted(value, like) for value in (first, second))
    return mapped(torch.where, (condition, first, second), {})


@register_rule("masked_fill")
def masked_fill(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, mask, value = _bind(args, kwargs, self=None, mask=None, value=None)
    if not isinstance(x, Taylor):
        raise NotCovered
    value = value if isinstance(value, Taylor) else constant(value, x)
    return Taylor(mapped(torch.where, (mask, value, x), {}).coefficients.contiguous())  # as torch's is


@register_rule("lerp")
def lerp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    start, end, weight = _bind(args, kwargs, input=None, end=None, weight=None)
    return start + weight * (end - start)


@register_rule("add", "sub", "subtract", "rsub")
def sum_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Sums and differences: derivatives of constants vanish."""
    left, right, alpha = _bind(args, kwargs, input=None, other=None, alpha=1)
    if isinstance(alpha, Taylor):
        left, right = (right, left) if function_name(func) == "rsub" else (left, right)
        return left + alpha * right if function_name(func) == "add" else left - alpha * right
    factors = {"alpha": alpha} if alpha != 1 else {}
    if isinstance(left, Taylor) and isinstance(right, Taylor):
        return mapped(func, (left, right), factors)
    value = func(*primals((left, right)), **factors)  # [*shape]
    of_left, of_right = {"add": (1, alpha), "rsub": (-alpha, 1)}.get(function_name(func), (1, -alpha))
    moving, factor = (left, of_left) if isinstance(left, Taylor) else (right, of_right)
    higher = moving.coefficients[1:]  # [order, *shape of the moving operand]
    if higher.shape[1:] != value.shape:
        padded = higher.reshape(higher.shape[0], *[1] * (value.dim() - higher.dim() + 1), *higher.shape[1:])
        higher = padded.expand(-1, *value.shape)
    higher = higher.to(value.dtype) if factor == 1 else higher.to(value.dtype) * factor
    return with_value(value, higher)


@register_rule("diff")
def diff(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Linear in x and what is put before and behind it, all together."""
    x, n, dim, prepend, append = _bind(args, kwargs, input=None, n=1, dim=-1, prepend=None, append=None)
    parts = [part for part in (prepend, x, append) if part is not None]
    return mapped(torch.diff, (x if len(parts) == 1 else torch.cat(parts, dim), n, dim), {})


@register_rule("pad")
def pad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    """Linear, but for a constant other than zero, which only x(0) shows."""
    x, widths, mode, value = _bind(args, kwargs, input=None, pad=None, mode="constant", value=None)
    if isinstance(value, Taylor):
        raise NotCovered
    if mode != "constant" or not value:
        return laid_out_by(func, args, kwargs, mapped(F.pad, (x, widths, mode), {}))
    return with_value(F.pad(x.primal, widths, mode, value), mapped(F.pad, (x, widths), {}).coefficients[1:])


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Arguments by position or name, in the order of ``defaults``; NotCovered if there are others."""
    if len(args) > len(defaults) or not defaults.keys() >= kwargs.keys():
        raise NotCovered
    return list({**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}.values())
