"""Rules of products: linear in each operand, so Leibniz when both move and ONE batched product when one does."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import linear as fast_linear
from .linear import _bind
from .value import (
    LinearCombination,
    NotCovered,
    Taylor,
    function_name,
    mapped,
    primals,
    register_rule,
    stacked,
    taylors,
    with_value,
)


def leibniz(product: Callable[[Tensor, Tensor], Tensor], a: Taylor, b: Taylor) -> Taylor:
    """(ab)' = a'b + ab', (ab)'' = a''b + 2a'b' + ab''."""
    x, y = a.coefficients, b.coefficients
    orders = [product(x[0], y[0]), product(x[1], y[0]) + product(x[0], y[1])]
    if a.order == 2:
        orders.append(product(x[2], y[0]) + 2 * product(x[1], y[1]) + product(x[0], y[2]))
    return stacked(orders)


@register_rule("mul", "multiply", "rmul", "matmul", "mm", "bmm", "mv", "dot", "inner", "outer", "ger", "kron")
def product_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:  # mul(input, other=...), mm(a, b, dtype)
        return _by_position(func, args, kwargs)
    a, b = args
    if isinstance(a, Taylor) and isinstance(b, Taylor):
        return leibniz(func, a, b)
    return mapped(func, args, kwargs)


def _by_position(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and len(kwargs) == 1 and kwargs.keys() <= {"other", "mat2", "vec", "vec2", "tensor"}:
        return product_rule(func, (*args, *kwargs.values()), {})
    raise NotCovered


_LETTERS = string.ascii_uppercase + string.ascii_lowercase  # of dimensions that are numbers, as torch has them


def _equation(args: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """Equation and operands, which may also come in a list, or each with the list of its dimensions behind it."""
    if isinstance(args[0], str):
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return args[0], list(operands)

    def letters(dimensions: Sequence[Any]) -> str:
        return "".join("..." if one is Ellipsis else _LETTERS[one] for one in dimensions)

    pairs = len(args) // 2
    equation = ",".join(letters(args[2 * i + 1]) for i in range(pairs))
    output = f"->{letters(args[-1])}" if len(args) % 2 else ""
    return equation + output, [args[2 * i] for i in range(pairs)]


@register_rule("einsum")
def einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    equation, operands = _equation(args)
    where = [i for i, operand in enumerate(operands) if isinstance(operand, Taylor)]
    if len(where) == 1:
        return mapped(torch.einsum, (equation, *operands), {})
    if len(where) > 2:
        raise NotCovered

    def contract(a: Tensor, b: Tensor) -> Tensor:
        filled = list(operands)
        filled[where[0]], filled[where[1]] = a, b
        return torch.einsum(equation, *filled)

    return leibniz(contract, operands[where[0]], operands[where[1]])


@register_rule("addmm", "baddbmm", "addbmm")
def add_product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "mat1", "mat2") if function_name(func) == "addmm" else ("input", "batch1", "batch2")
    bias, a, b, beta, alpha = _bind(args, kwargs, **dict.fromkeys(names), beta=1, alpha=1)
    if beta == 0:  # torch ignores the bias then, NaN included
        raise NotCovered
    product = torch.matmul(a, b)
    product = product.sum(0) if function_name(func) == "addbmm" else product
    product, bias = (x if factor == 1 else factor * x for factor, x in ((alpha, product), (beta, bias)))
    return product + bias


def _affine(linear: Callable[..., Any], x: Any, weight: Any, bias: Any, bias_shape: tuple[int, ...]) -> Taylor:
    """linear(x, weight) + bias, the bias on x(0) only."""
    if isinstance(x, Taylor) and isinstance(weight, Taylor):
        out = leibniz(linear, x, weight)
    elif isinstance(x, LinearCombination) and x.basis is not None:
        out = Taylor(x.after(linear(x.basis, weight)))
    else:
        out = mapped(linear, (x, weight), {})
    if bias is None:
        return out
    if isinstance(bias, Taylor):
        return out + bias.reshape(bias_shape)
    out.coefficients[0].add_(bias.reshape(bias_shape))  # in place: the product's own fresh memory
    return out


def plus_bias(out: Tensor, bias: Tensor) -> Taylor:
    """A product's fresh memory ``out`` [order + 1, ..., C] with ``bias`` [C] on x(0), added when somebody asks."""
    if not torch.is_grad_enabled() and bias.shape == out.shape[-1:]:  # autograd may keep what is added to in place
        return Taylor(out, bias)
    out[0].add_(bias)
    return Taylor(out)


@register_rule("linear")
def linear(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    x, weight, bias = _bind(args, kwargs, input=None, weight=None, bias=None)
    if weight.dim() != 2:
        raise NotCovered
    if isinstance(x, Taylor) and not taylors(weight, bias):  # [orders, *, features]: one product of all rows
        out = fast_linear(x.coefficients, weight)
        return Taylor(out) if bias is None else plus_bias(out, bias)
    return _affine(F.linear, x, weight, bias, (-1,))


@register_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    names = dict.fromkeys(("input", "weight", "bias"))
    x, weight, bias = _bind(args[:3], {k: v for k, v in kwargs.items() if k in names}, **names)
    rest = {k: v for k, v in kwargs.items() if k not in names}

    def convolve(image: Tensor, kernels: Tensor) -> Tensor:
        return func(image, kernels, None, *args[3:], **rest)

    out = _affine(convolve, x, weight, bias, (-1, *[1] * (weight.dim() - 2)))
    return Taylor(out.coefficients.contiguous()) if isinstance(weight, Taylor) else out  # vmap puts orders inside


@register_rule("div", "divide", "true_divide", "truediv", "rdiv", "rtruediv")
def quotient(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """y = a / b: y b = a, differentiated."""
    a, b, rounding_mode = _bind(args, kwargs, input=None, other=None, rounding_mode=None)
    if rounding_mode is not None:  # steps, between which nothing moves
        return torch.div(*primals((a, b)), rounding_mode=rounding_mode)
    if function_name(func) in ("rtruediv", "rdiv"):
        a, b = b, a
    if not isinstance(b, Taylor):
        return mapped(torch.div, (a, b), {})
    x = a.coefficients if isinstance(a, Taylor) else [a, 0.0, 0.0]
    y = [torch.div(x[0], b.primal)]
    for k, d in enumerate(b.coefficients[1:], 1):
        known = d * y[0] if k == 1 else d * y[0] + 2 * b.coefficients[1] * y[1]
        y.append((x[k] - known) / b.primal)
    return stacked(y)


@register_rule("remainder", "fmod", "mod", "rmod")
def modulus(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a - k b, the number of times k that b is in a being a step between which nothing moves."""
    a, b = _bind(args, kwargs, input=None, other=None)
    value = func(*primals((a, b)))
    if function_name(func) == "rmod":
        a, b = b, a
    times = torch.div(*primals((a, b)), rounding_mode="trunc" if function_name(func) == "fmod" else "floor")
    moved = a - times * b
    return with_value(value, moved.coefficients[1:].expand(-1, *value.shape))
