"""Faster classes for modules of other packages: same weights, same numbers.

``replacement`` says what they have in common, ``registry`` which class becomes which; then a file for each source.
"""

from .registry import FAMILIES, Family, families_table
from .report import Decision, OpRun, Report
from .swap import accelerate, restore
from .verify import Difference, Verification, verify

__all__ = [
    "FAMILIES",
    "Decision",
    "Difference",
    "Family",
    "OpRun",
    "Report",
    "Verification",
    "accelerate",
    "families_table",
    "restore",
    "verify",
]
