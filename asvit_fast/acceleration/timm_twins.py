"""Replacement for the windowed attention of timm's Twins (arXiv 2104.13840), which cuts its windows itself."""

from __future__ import annotations

from typing import ClassVar

from timm.models.twins import LocallyGroupedAttn
from torch import Tensor

from ..ops.window_attention import window_attention
from .computing import attention_drops, padding_token, project
from .replacement import DROP, LINEAR, Names, Parts, Replacement


class FastLocallyGroupedAttn(Replacement, LocallyGroupedAttn):
    """Tokens [B, H*W, C] as one map."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("ws", "num_heads", "fused_attn", "scale", "proj", "proj_drop")
    parts: ClassVar[Parts] = {"qkv": LINEAR, "attn_drop": DROP}

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not self.can_run() or attention_drops(self):
            return super().forward(x, size)
        window = (self.ws, self.ws)
        x = x.unflatten(1, (size[0], size[1]))  # [B, H, W, C]
        padding = padding_token(self.qkv.bias, x, window)
        scale = None if self.fused_attn else self.scale
        x = window_attention(
            project(self.qkv, x), self.num_heads, window, (0, 0), None, scale, 0.0, "timm", padding
        )  # [B, H, W, C]
        return self.proj_drop(self.proj(x.flatten(1, 2)))
