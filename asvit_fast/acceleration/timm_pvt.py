"""Replacement for the patch embedding of PVT v2 (arXiv 2106.13797)."""

from __future__ import annotations

from typing import Any

from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor

from .embedding import Embedding

FEW = 16  # channels of an image up to which the op is faster; from 64 on torch's convolution is


class FastOverlapPatchEmbed(Embedding, OverlapPatchEmbed):
    """[B, Cin, H, W] -> [B, Ho, Wo, C]."""

    pads = True

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        channels = getattr(module._modules.get("proj"), "in_channels", 0)
        return None if channels <= FEW else f"of {channels} channels torch's convolution is as fast or faster"

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        rows, columns = (int(size) for size in self.proj.padding)
        return self._embed(x, (columns, columns, rows, rows))
