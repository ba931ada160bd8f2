"""Replacement for the patch embedding of PVT v2 (arXiv 2106.13797)."""

from __future__ import annotations

from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor

from .embedding import Embedding


class FastOverlapPatchEmbed(Embedding, OverlapPatchEmbed):
    """[B, Cin, H, W] -> [B, Ho, Wo, C]."""

    pads = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        rows, columns = (int(size) for size in self.proj.padding)
        return self._embed(x, (columns, columns, rows, rows))
