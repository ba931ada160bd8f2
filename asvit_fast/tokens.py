"""Token reductions: how many times fewer tokens per side a network may have (As-ViT, arXiv 2202.11921, section 3.4)."""

from __future__ import annotations

from typing import Any

from .errors import InputError

REDUCTIONS = (1, 2, 4)


def check_token_reduction(reduction: Any) -> None:
    """Raise InputError for anything but 1, 2 and 4."""
    if isinstance(reduction, bool) or reduction not in REDUCTIONS:
        raise InputError(f"token reduction must be 1, 2 or 4 per side, got {reduction!r}")


def tokens_text(reduction: int) -> str:
    """Say how many tokens there are, in words."""
    return "full tokens" if reduction == 1 else f"{reduction} times fewer tokens per side"
