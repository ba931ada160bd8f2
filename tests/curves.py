"""Derivatives of a function of one tensor along a curve by finite differences in float64; operands to try it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import asvit_fast as af

Case = Callable[[Tensor], Any]

FIRST = ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280))  # central differences of order 8: step, weight
SECOND = ((0, -205 / 72), (1, 8 / 5), (2, -1 / 5), (3, 8 / 315), (4, -1 / 560))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(output: Any) -> Tensor:
    """Everything that moves in an output (real and imaginary parts), as one vector."""
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in tensors if t.is_floating_point()])


def along_the_curve(f: Callable[[Tensor], Any], x: Tensor, dx: Tensor, ddx: Tensor, h: float = 2e-4) -> list[Tensor]:
    """Value, velocity and acceleration of t -> f(x + t dx + t^2/2 ddx) at 0, each flat."""

    def at(k: int) -> Tensor:
        torch.manual_seed(0)
        return flat(f(x + k * h * dx + (k * h) ** 2 / 2 * ddx))

    points = {k: at(k) for k in range(-4, 5)}
    first = sum(weight * (points[k] - points[-k]) for k, weight in FIRST) / h
    second = sum(weight * (points[k] + points[-k]) / (2 if k == 0 else 1) for k, weight in SECOND) / h**2
    return [points[0], first, second]  # type: ignore[list-item]


def check(f: Callable[[Tensor], Any], x: Tensor, dx: Tensor, ddx: Tensor) -> None:
    expected = along_the_curve(f, x, dx, ddx)
    torch.manual_seed(0)
    second_order = [flat(order) for order in af.jet(f, x, dx, ddx)]
    torch.manual_seed(0)
    first_order = [flat(order) for order in af.jvp(f, x, dx)]
    torch.testing.assert_close(second_order[0], expected[0], rtol=1e-11, atol=1e-12)
    for got, order, tolerance in (
        (first_order[1], 1, 1e-8),
        (second_order[1], 1, 1e-8),
        (second_order[2], 2, 3e-5),
    ):
        error = float((got - expected[order]).abs().max()) / (1e-2 + float(expected[order].abs().max()))
        assert error < tolerance, f"order {order}: {error:.1e}"


W, V, INDEX = draw(10, 5, 6), draw(11, 5, 6), torch.tensor([[0, 2, 1], [3, 3, 0]])
P = W.abs() + 0.5
MASK = W > 0
TARGET = torch.tensor([0, 3, 5, 1, 2])


def positive(x: Tensor) -> Tensor:
    return x * x + 0.7


def inside(x: Tensor) -> Tensor:
    """Between -0.9 and 0.9."""
    return 0.9 * torch.tanh(x)


def square(x: Tensor) -> Tensor:
    """A regular matrix [5, 5]."""
    return x[:, :5] + 4 * torch.eye(5, dtype=x.dtype)


def definite(x: Tensor) -> Tensor:
    return x @ x.mT + 2 * torch.eye(5, dtype=x.dtype)


def image(x: Tensor) -> Tensor:
    """[1, 2, 3, 5]."""
    return x.reshape(1, 2, 3, 5)


def volume(x: Tensor) -> Tensor:
    """[1, 1, 2, 3, 5]."""
    return x.reshape(1, 1, 2, 3, 5)


def signal(x: Tensor) -> Tensor:
    """[1, 3, 10]."""
    return x.reshape(1, 3, 10)


def directions() -> list[Tensor]:
    """x, dx, ddx [5, 6]: along the short piece of curve that is looked at, no two numbers change their order."""
    return [draw(20, 5, 6), draw(120, 5, 6) / 2, draw(220, 5, 6) / 2]
