"""Rules of products: linear in each operand, so Leibniz when both move and ONE batched product when one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import linear as fast_linear
from .linear import _bind
from .value import Combination, Taylor, mapped, register_rule


def leibniz(product: Callable[[Tensor, Tensor], Tensor], a: Taylor, b: Taylor) -> Taylor:
    """(ab)' = a'b + ab', (ab)'' = a''b + 2a'b' + ab''."""
    x, y = a.coefficients, b.coefficients
    orders = [product(x[0], y[0]), product(x[1], y[0]) + product(x[0], y[1])]
    if a.order == 2:
        orders.append(product(x[2], y[0]) + 2 * product(x[1], y[1]) + product(x[0], y[2]))
    return Taylor(torch.stack(orders))


@register_rule("mul", "multiply", "rmul", "matmul", "mm", "bmm", "mv", "dot", "inner", "outer", "kron")
def product_rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    a, b = args[:2]
    if isinstance(a, Taylor) and isinstance(b, Taylor):
        return leibniz(func, a, b)
    return mapped(func, args, kwargs)


@register_rule("einsum")
def einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    equation, operands = args[0], list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    where = [i for i, operand in enumerate(operands) if isinstance(operand, Taylor)]
    if len(where) == 1:
        return mapped(torch.einsum, (equation, *operands), {})
    if (
        len(where) > 2
    ):  # pair by pair: the last moving operand is multiplied by the others along a product rule of its own
        raise NotImplementedError("einsum of more than two Taylor values: split it into products of two")

    def contract(a: Tensor, b: Tensor) -> Tensor:
        filled = list(operands)
        filled[where[0]], filled[where[1]] = a, b
        return torch.einsum(equation, *filled)

    return leibniz(contract, operands[where[0]], operands[where[1]])


@register_rule("addmm", "baddbmm", "addbmm")
def add_product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    bias, a, b = args[:3]
    product = torch.matmul(a, b)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    return alpha * (product.sum(0) if func.__name__ == "addbmm" else product) + beta * bias


def _affine(linear: Callable[..., Any], x: Any, weight: Any, bias: Any, bias_shape: tuple[int, ...]) -> Taylor:
    """linear(x, weight) + bias, the bias on x(0) only."""
    if isinstance(x, Taylor) and isinstance(weight, Taylor):
        out = leibniz(linear, x, weight)
    elif isinstance(x, Combination) and x.basis is not None:
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
    if isinstance(x, Taylor) and not isinstance(weight, Taylor):  # [orders, *, features]: one product of all rows
        out = fast_linear(x.coefficients, weight)
        return Taylor(out) if bias is None else plus_bias(out, bias)
    return _affine(F.linear, x, weight, bias, (-1,))


@register_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    names = dict.fromkeys(("input", "weight", "bias"))
    x, weight, bias = _bind(args, kwargs, **names)
    rest = {k: v for k, v in kwargs.items() if k not in names}

    def convolve(image: Tensor, kernels: Tensor) -> Tensor:
        return func(image, kernels, None, *args[3:], **rest)

    return _affine(convolve, x, weight, bias, (-1, *[1] * (weight.dim() - 2)))


@register_rule("div", "divide", "true_divide", "truediv", "rdiv", "rtruediv")
def quotient(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    a, b = args[:2]
    if func.__name__ in ("__rtruediv__", "__rdiv__"):
        a, b = b, a
    if not isinstance(b, Taylor):
        return mapped(torch.div, (a, b), {})
    return a * b.reciprocal()
