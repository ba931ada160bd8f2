"""Base class of replacements for Swin's patch merging (arXiv 2103.14030, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.patch_merge import patch_merge
from .replacement import Replacement, bypass_reason


class Merging(Replacement):
    """2 x 2 tokens, normalised and projected."""

    ops = ("patch_merge",)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        return "its norm has no weight" if why is None and module.norm.weight is None else why

    def _merge(self: Any, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), Cout]."""
        norm, reduction = self.norm, self.reduction
        return patch_merge(x, reduction.weight, 2, 2, norm.weight, norm.bias, reduction.bias, norm.eps, "timm")
