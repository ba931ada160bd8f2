"""Replacements for Swin's patch merging (arXiv 2103.14030, section 3.1) in timm and torchvision."""

from __future__ import annotations

from typing import Any, ClassVar

import torchvision.models.swin_transformer
from timm.layers import LayerNorm
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..ops.patch_merge import patch_merge
from .replacement import LINEAR, Parts, Replacement, bypass_reason


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


class FastPatchMerging(Merging, PatchMerging):
    """timm's: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), out_dim]."""

    source = PatchMerging
    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm, LayerNorm), "reduction": LINEAR}

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(x) if self.can_run() else super().forward(x)


class FastTorchvisionPatchMerging(Merging, torchvision.models.swin_transformer.PatchMerging):
    """torchvision's: [..., H, W, C] -> [..., ceil(H/2), ceil(W/2), 2*C]."""

    source = torchvision.models.swin_transformer.PatchMerging
    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(x) if x.dim() == 4 and self.can_run() else super().forward(x)
