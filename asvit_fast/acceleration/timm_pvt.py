"""Replacement for the patch embedding of PVT v2 (arXiv 2106.13797)."""

from __future__ import annotations

from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor

from .embedding import OverlappingEmbedding


class FastOverlapPatchEmbed(OverlappingEmbedding, OverlapPatchEmbed):
    """[B, Cin, H, W] -> [B, Ho, Wo, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return self._overlapping(x) if self.can_run() else super().forward(x)
