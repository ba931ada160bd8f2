"""Replacements for timm's attention modules that cut or get their windows themselves: Twins (arXiv 2104.13840) and NesT
(arXiv 2105.12723)."""

from __future__ import annotations

from typing import ClassVar

from timm.models.nest import Attention
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor

from ..ops.window_attention import window_attention
from .replacement import DROP, LINEAR, Parts, Replacement, attention_drops, padding_token, project


class FastLocallyGroupedAttn(Replacement, LocallyGroupedAttn):
    """Tokens [B, H*W, C] as one map."""

    source = LocallyGroupedAttn
    ops = ("window_attention",)
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


class FastNestAttention(Replacement, Attention):
    """Blocks of tokens [B, T, N, C] as a map of T rows, each row a window."""

    source = Attention
    ops = ("window_attention",)
    parts: ClassVar[Parts] = {"attn_drop": DROP}

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or attention_drops(self):
            return super().forward(x)
        scale = None if self.fused_attn else self.scale
        x = window_attention(self.qkv(x), self.num_heads, (1, x.shape[2]), scale=scale)  # [B, T, N, C]
        x = x.unflatten(3, (self.num_heads, -1)).transpose(3, 4).flatten(3)  # channels [d][head], as NesT has them
        return self.proj_drop(self.proj(x))
