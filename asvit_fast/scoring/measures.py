"""Length and curvature of a curve. Source: As-ViT (arXiv 2202.11921), section 3.2; the two conventions are in the
documentation.

"paper" integrates over theta in [0, 2 pi) (mean times 2 pi; the paper's surplus square root left out), "reference" sums
over the thetas as the authors' code does. Results are floats, computed in float64, NaN or inf when the curve is not
finite. Gradients with respect to weights flow through the curve's tensors: the length distortion of the paper is
``2 * math.pi * c.velocity.norm(dim=1).mean()``, which can be differentiated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError
from ..settings import CONVENTIONS, check_choice, check_kind
from .curve import Curve

REFERENCE_BATCH = 6  # thetas that the authors' code passes at a time, which its Gauss length depends on


def _integral(values: Tensor, convention: str) -> float:
    """values [n], one per theta."""
    check_choice("convention", convention, CONVENTIONS)
    values = values.detach()
    return float(values.sum() if convention == "reference" else 2 * math.pi * values.mean())


def _derivatives(c: Curve) -> tuple[Tensor, Tensor]:
    """Velocity and acceleration [n, F] in float64."""
    check_kind("c", c, Curve, "what curve(...) returns")
    if c.acceleration is None:
        raise InputError("curvature and Gauss length need the acceleration: call curve(..., order=2)")
    return c.velocity.double(), c.acceleration.double()


def _turning(v: Tensor, a: Tensor) -> Tensor:
    """|a_perp| [n], the acceleration across the velocity: sqrt((v.v)(a.a) - (v.a)^2) / |v| without its cancellation."""
    along = (v * a).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True)
    return (a - along * v).norm(dim=1)


def length_distortion(c: Curve, convention: str = "paper") -> float:
    """L^E: the length of the curve, integral of |v| (As-ViT, arXiv 2202.11921, section 3.2), in units of the output.

    Args:
        c: result of ``curve``.
        convention: "paper" integrates over the angle, "reference" sums over the points as the authors' code does.

    Raises:
        InputError: an unknown convention.

    Examples:
        >>> import math, torch, asvit_fast as af
        >>> theta = torch.linspace(0, 2 * math.pi, 9)[:8]  # [n]
        >>> u0, u1 = torch.eye(3, dtype=torch.float64)[:2]  # [3] each
        >>> c = af.curve(torch.nn.Identity(), theta, u0, u1, scale=2.0, order=1)
        >>> math.isclose(af.length_distortion(c), 2 * math.pi * 2, rel_tol=1e-6)  # the circumference
        True
    """
    check_kind("c", c, Curve, "what curve(...) returns")
    return _integral(c.velocity.double().norm(dim=1), convention)


def curvature(c: Curve, convention: str = "paper") -> float:
    """kappa: integral of (v.v)^(-3/2) sqrt((v.v)(a.a) - (v.a)^2) (As-ViT, section 3.2), in 1 / units of the output.

    Args:
        c: result of ``curve``, of order 2.
        convention: "paper" integrates over the angle, "reference" sums over the points as the authors' code does.

    Raises:
        InputError: an unknown convention, or a curve without acceleration.

    Examples:
        >>> import math, torch, asvit_fast as af
        >>> theta = torch.linspace(0, 2 * math.pi, 9)[:8]  # [n]
        >>> u0, u1 = torch.eye(3, dtype=torch.float64)[:2]  # [3] each
        >>> c = af.curve(torch.nn.Identity(), theta, u0, u1, scale=2.0)
        >>> math.isclose(af.curvature(c), 2 * math.pi / 2, rel_tol=1e-6)  # 1 / radius all the way round
        True
    """
    v, a = _derivatives(c)
    return _integral(_turning(v, a) / (v * v).sum(1), convention)


def gauss_length(c: Curve, convention: str = "paper", batch: int = REFERENCE_BATCH) -> float:
    """L_kappa^E: the length of the unit velocity's curve, integral of |d(v/|v|)/d theta|, in radians.

    "reference" gives what the authors' code returns: with ``batch`` thetas at a time, the sum over batches of
    (sum of |a|) (sum of 1/|v|), a slip of broadcasting that makes it about ``batch`` times too large.

    Args:
        c: result of ``curve``, of order 2.
        convention: "paper" integrates over the angle, "reference" sums over the points as the authors' code does.
        batch: points that the authors' code takes at a time.

    Raises:
        InputError: an unknown convention, or a curve without acceleration.

    Examples:
        >>> import math, torch, asvit_fast as af
        >>> theta = torch.linspace(0, 2 * math.pi, 9)[:8]  # [n]
        >>> u0, u1 = torch.eye(3, dtype=torch.float64)[:2]  # [3] each
        >>> c = af.curve(torch.nn.Identity(), theta, u0, u1, scale=2.0)
        >>> math.isclose(af.gauss_length(c), 2 * math.pi, rel_tol=1e-6)  # its direction turns once
        True
    """
    v, a = _derivatives(c)
    check_choice("convention", convention, CONVENTIONS)
    if convention == "paper":
        return _integral(_turning(v, a) / v.norm(dim=1), convention)
    accelerations, inverse_speeds = a.norm(dim=1).split(batch), (1 / v.norm(dim=1)).split(batch)
    return float(torch.stack([x.sum() * y.sum() for x, y in zip(accelerations, inverse_speeds, strict=True)]).sum())
