"""Truncated Taylor propagation: value, velocity and acceleration of a whole network along a curve, in one pass.

Ordinary functions and modules run unchanged on a ``Taylor`` value; rules (one per torch function) say how the
derivatives go through. Rules of your own: ``@register_rule(function)``.
"""

from . import (  # noqa: F401  (they register rules)
    attention,
    elementwise,
    linear,
    multihead,
    normalization,
    products,
    recurrent,
    reverse,
    selection,
    window_attention,
)
from .propagate import jet, jvp
from .value import Taylor, TaylorError, register_rule

__all__ = ["Taylor", "TaylorError", "jet", "jvp", "register_rule"]
