"""Truncated Taylor propagation: value, velocity and acceleration of a whole network along a curve, in one pass.

Ordinary functions and modules run unchanged on a ``Taylor`` value; rules (one per torch function) say how the
derivatives go through. Rules of your own: ``@register_rule(function)``.
"""

from . import attention, elementwise, linear, multihead, normalization, products, window_attention  # noqa: F401  (they register rules)
from .propagate import jet, jvp
from .value import Taylor, TaylorError, register_rule

__all__ = ["Taylor", "TaylorError", "jet", "jvp", "register_rule"]
