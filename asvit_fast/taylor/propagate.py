"""Derivatives of a function along a curve: ``jvp`` (order 1) and ``jet`` (order 2)."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InputError, first_line
from .value import Taylor, TaylorError, gradients_wanted, laid_out, refuse_autograd_functions

T = TypeVar("T")  # what a function gives
_INNER = (
    str(Path(__file__).parent),
    str(Path(torch.__file__).parent / "_functorch"),
    pytree.__file__,
)  # not the user's


def jvp(fn: Callable[[Any], T], x: Tensor, dx: Tensor) -> tuple[T, T]:
    """Value and directional derivative of ``fn`` in one pass (a Jacobian-vector product).

    Args:
        fn: a Module or function of one tensor; its output may be a tensor or any nesting of tensors.
        x, dx: point and direction, of the same shape and dtype.

    Returns:
        ``(y, v)``: ``fn(x)`` and d/dt fn(x + t dx) at t = 0, of the same shape.

    Raises:
        ValueError: shapes, dtypes or devices of ``x`` and ``dx`` differ, or x is neither floating point nor complex.
        TaylorError: a torch function that cannot be propagated, named.

    ``fn`` gets a ``Taylor`` value, for which ``isinstance(x, torch.Tensor)`` and ``torch.is_tensor(x)`` are False: code
    that branches on them takes the other branch.

    Where gradients are enabled, both outputs can be differentiated with respect to weights and inputs.

    Examples:
        >>> import torch, asvit_fast as af
        >>> x, dx = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])
        >>> af.jvp(torch.square, x, dx)  # x^2 and 2 x dx
        (tensor([1., 4.]), tensor([2., 2.]))
    """
    y, v = _propagate(fn, x, dx)
    return y, v


def jet(fn: Callable[[Any], T], x: Tensor, dx: Tensor, ddx: Tensor) -> tuple[T, T, T]:
    """Value, velocity and acceleration of ``fn`` along a curve, in one pass.

    Args:
        fn: a Module or function of one tensor; its output may be a tensor or any nesting of tensors.
        x, dx, ddx: position, velocity and acceleration of the input, of the same shape and dtype.

    Returns:
        ``(y, v, a)``: the value and the first two derivatives of ``fn(x + t dx + t^2/2 ddx)`` at t = 0.

    Raises:
        ValueError: shapes, dtypes or devices of the inputs differ, or x is neither floating point nor complex.
        TaylorError: a torch function that cannot be propagated, named.

    ``fn`` gets a ``Taylor`` value, for which ``isinstance(x, torch.Tensor)`` and ``torch.is_tensor(x)`` are False: code
    that branches on them takes the other branch.

    Examples:
        >>> import torch, asvit_fast as af
        >>> x, dx = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])
        >>> af.jet(torch.square, x, dx, torch.zeros(2))  # x^2, 2 x dx and 2 dx^2
        (tensor([1., 4.]), tensor([2., 2.]), tensor([2.0000, 0.5000]))
    """
    y, v, a = _propagate(fn, x, dx, ddx)
    return y, v, a


def _propagate(fn: Callable[[Any], Any], *derivatives: Tensor) -> tuple[Any, ...]:
    x = derivatives[0]
    if not (x.is_floating_point() or x.is_complex()):
        raise InputError(f"x must be floating point or complex to move along a curve, got {x.dtype}")
    for name, derivative in zip(("dx", "ddx"), derivatives[1:], strict=False):
        if derivative.shape != x.shape or derivative.dtype != x.dtype or derivative.device != x.device:
            raise InputError(
                f"{name} must match x ({list(x.shape)}, {x.dtype}, {x.device}), "
                f"got {list(derivative.shape)}, {derivative.dtype}, {derivative.device}"
            )
    return propagate_taylor(fn, Taylor(laid_out(torch.stack(derivatives), x)))


def propagate_taylor(fn: Callable[[Any], Any], x: Taylor) -> tuple[Any, ...]:
    """The orders of ``fn(x)``, as ``jvp`` and ``jet`` return them."""
    orders = x.order + 1
    token = gradients_wanted.set(torch.is_grad_enabled())
    try:
        output = fn(x)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        _name_what_refused(error)
        raise
    finally:
        gradients_wanted.reset(token)

    def order(k: int) -> Any:
        return pytree.tree_map(
            lambda leaf: _coefficient(leaf, k), output, is_leaf=lambda leaf: isinstance(leaf, Taylor)
        )

    return tuple(order(k) for k in range(orders))


def _name_what_refused(error: Exception) -> None:
    """TaylorError if ``error`` is a compiled function's word that it takes no Taylor value."""
    if isinstance(error, TaylorError) or not (isinstance(error, AssertionError) or "Taylor" in str(error)):
        return
    refuse_autograd_functions((frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)), error)
    if not isinstance(error, AssertionError):
        frames = traceback.extract_tb(error.__traceback__)
        where = [f for f in frames if not f.filename.startswith(_INNER)][-1]
        raise TaylorError(
            f"no Taylor rule for what `{where.line}` ({where.name}) calls: {first_line(error)}"
        ) from error


def _coefficient(leaf: Any, k: int) -> Any:
    if isinstance(leaf, Taylor):
        return leaf.coefficients[k]
    if isinstance(leaf, Tensor) and k > 0:  # an output that does not depend on the input
        return torch.zeros_like(leaf)
    return leaf
