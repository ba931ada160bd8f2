"""Replacement for the attention of timm's NesT (arXiv 2105.12723), which gets its windows cut."""

from __future__ import annotations

from typing import ClassVar

from timm.models.nest import Attention
from torch import Tensor

from ..ops.window_attention import window_attention
from .computing import attention_drops
from .replacement import DROP, Names, Parts, Replacement


class FastNestAttention(Replacement, Attention):
    """Blocks of tokens [B, T, N, C] as a map of T rows, each row a window."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("num_heads", "fused_attn", "scale", "qkv", "proj", "proj_drop")
    parts: ClassVar[Parts] = {"attn_drop": DROP}

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or attention_drops(self):
            return super().forward(x)
        scale = None if self.fused_attn else self.scale
        x = window_attention(self.qkv(x), self.num_heads, (1, x.shape[2]), scale=scale)  # [B, T, N, C]
        x = x.unflatten(3, (self.num_heads, -1)).transpose(3, 4).flatten(3)  # channels [d][head], as NesT has them
        return self.proj_drop(self.proj(x))
