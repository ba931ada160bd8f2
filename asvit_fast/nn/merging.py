"""Replacements for Swin's patch merging (arXiv 2103.14030, section 3.1) in timm and torchvision."""

from __future__ import annotations

from typing import Any

import torchvision.models.swin_transformer
from timm.layers import LayerNorm
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..ops.patch_merge import patch_merge
from .replacement import Replacement, why_not_bypass


def _merge(module: Any, x: Tensor) -> Tensor:
    """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), Cout]."""
    norm = module.norm
    return patch_merge(x, module.reduction.weight, 2, 2, norm.weight, norm.bias, None, norm.eps, "timm")


class FastPatchMerging(Replacement, PatchMerging):
    """timm's: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), out_dim]."""

    source = PatchMerging

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if getattr(module.norm, "weight", None) is None:
            return "its norm has no weight"
        return why_not_bypass(module, norm=(nn.LayerNorm, LayerNorm), reduction=nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        return _merge(self, x) if self.usable() else super().forward(x)


class FastTorchvisionPatchMerging(Replacement, torchvision.models.swin_transformer.PatchMerging):
    """torchvision's: [..., H, W, C] -> [..., ceil(H/2), ceil(W/2), 2*C]."""

    source = torchvision.models.swin_transformer.PatchMerging

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if getattr(module.norm, "weight", None) is None:
            return "its norm has no weight"
        return why_not_bypass(module, norm=nn.LayerNorm, reduction=nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or not self.usable():
            return super().forward(x)
        return _merge(self, x)
