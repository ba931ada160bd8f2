"""Faster classes for modules of other packages: same weights, same numbers.

``replacement`` says what they have in common, ``registry`` which class becomes which; then a file for each source. Code
that is no package is recognised by its attributes and syntax: ``structure``. ``register`` adds a class of your own.
"""

from .check import check_replacement
from .registry import FAMILIES, Family, families_table, register, unregister
from .replacement import Replacement
from .report import Decision, OpRun, Report
from .structure import Structural
from .swap import accelerate, restore
from .syntax import method_digest
from .unknown import Unknown
from .verify import Difference, Verification, verify

__all__ = [
    "FAMILIES",
    "Decision",
    "Difference",
    "Family",
    "OpRun",
    "Replacement",
    "Report",
    "Structural",
    "Unknown",
    "Verification",
    "accelerate",
    "check_replacement",
    "families_table",
    "method_digest",
    "register",
    "restore",
    "unregister",
    "verify",
]
