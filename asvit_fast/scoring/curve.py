"""A circle of inputs pushed through a network: h(theta) = scale (u0 cos theta + u1 sin theta).

Source: As-ViT (arXiv 2202.11921), section 3.2, after Poole et al. (arXiv 1606.05340).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..settings import CONVENTIONS, check_choice
from ..taylor.propagate import propagate_taylor
from ..taylor.value import LinearCombination
from .memory import split_on_oom
from .outputs import as_features


@dataclass(frozen=True)
class Curve:
    """The image of the circle at ``theta`` [n] (radians) and its derivatives with respect to theta, each [n, F]."""

    theta: Tensor
    output: Tensor
    velocity: Tensor
    acceleration: Tensor | None = None  # None for order 1


def theta_grid(thetas: int, convention: str = "paper") -> Tensor:
    """[thetas] float64 angles: "paper" 2 pi k / n, open; "reference" with both ends, so that theta = 0 counts twice."""
    check_choice("convention", convention, CONVENTIONS)
    if thetas < 1:
        raise InputError(f"thetas must be 1 or more, got {thetas}")
    if convention == "reference":
        return torch.linspace(0.0, 2 * math.pi, thetas, dtype=torch.float64)
    return 2 * math.pi * torch.arange(thetas, dtype=torch.float64) / thetas


def circle(shape: Sequence[int], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two orthonormal inputs u0, u1 of ``shape``, float64, spanning a random plane."""
    u0, u1 = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    u0 = u0 / u0.norm()
    u1 = u1 - (u0 * u1).sum() * u0
    return u0, u1 / u1.norm()


def radius(shape: Sequence[int], convention: str) -> float:
    """Of the circle of inputs of ``shape`` that a score sends through a network."""
    return math.sqrt(math.prod(shape)) if convention == "paper" else 1.0


def circle_mix(theta: Tensor, scale: float, order: int, dtype: torch.dtype) -> Tensor:
    """[order + 1, n, 2]: how much of u0 and u1 is in the circle of radius ``scale`` at ``theta`` [n] (radians), and in
    its derivatives."""
    position, velocity = (
        scale * torch.stack(mix, 1).to(dtype)  # [n, 2]
        for mix in ((theta.cos(), theta.sin()), (-theta.sin(), theta.cos()))
    )
    return torch.stack([position, velocity, -position][: order + 1])


def curve(
    fn: Callable[[Any], Tensor], theta: Tensor, u0: Tensor, u1: Tensor, scale: float = 1.0, order: int = 2
) -> Curve:
    """Push the circle through ``fn``: one Taylor pass for all thetas, split by itself when memory runs out.

    Args:
        fn: a Module or function, [n, *shape] -> [n, ...], or a dict, tuple or output of transformers with logits or
            with one tensor; the output is flattened to [n, F].
        theta: [n], radians.
        u0, u1: [*shape], orthonormal; their dtype and device are those of the pass.
        scale: radius of the circle: sqrt(u0.numel()) in the paper, 1 in the authors' code.
        order: 1 (velocity) or 2 (velocity and acceleration).

    Raises:
        InputError: an order other than 1 or 2, u0 and u1 of different shapes, no theta, an output that is not [n, ...].
        TaylorError: a torch function that cannot be propagated, named.

    Examples:
        >>> import math, torch, asvit_fast as af
        >>> theta = torch.linspace(0, 2 * math.pi, 9)[:8]  # [n]
        >>> u0, u1 = torch.eye(3, dtype=torch.float64)[:2]  # [3] each
        >>> c = af.curve(torch.nn.Identity(), theta, u0, u1, scale=2.0)
        >>> c.output.shape, c.velocity.norm(dim=1)[0].item()  # [n, F]; a circle of radius 2 has the speed 2
        (torch.Size([8, 3]), 2.0)
    """
    if order not in (1, 2):
        raise InputError(f"order must be 1 or 2, got {order!r}")
    if u0.shape != u1.shape:
        raise InputError(f"u0 and u1 must have one shape, got {list(u0.shape)} and {list(u1.shape)}")
    if theta.dim() != 1 or len(theta) == 0:
        raise InputError(f"theta must be [n], one angle or more, got {list(theta.shape)}")

    def run(part: slice) -> list[Tensor]:
        mix = circle_mix(theta[part], scale, order, u0.dtype).to(u0.device)
        circle = LinearCombination(mix, torch.stack([u0, u1]))
        return list(propagate_taylor(lambda x: as_features(fn(x), x.shape[0]), circle))

    pieces = split_on_oom(run, len(theta), "the curve")
    return Curve(theta, *(torch.cat(parts) for parts in zip(*pieces, strict=True)))
