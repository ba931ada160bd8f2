"""Replacements for timm's attention modules that cut or get their windows themselves: Twins (arXiv 2104.13840) and NesT
(arXiv 2105.12723)."""

from __future__ import annotations

from typing import Any

from timm.models.nest import Attention
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .replacement import Replacement, attention_dropout, padding_token, why_not_bypass


class FastLocallyGroupedAttn(Replacement, LocallyGroupedAttn):
    """Tokens [B, H*W, C] as one map."""

    source = LocallyGroupedAttn

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, attn_drop=nn.Dropout)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if not self.usable():
            return super().forward(x, size)
        window = (self.ws, self.ws)
        x = x.unflatten(1, (size[0], size[1]))  # [B, H, W, C]
        padding = padding_token(self.qkv, x, window)
        dropout = attention_dropout(self.attn_drop.p, self.attn_drop.training)
        x = window_attention(
            self.qkv(x), self.num_heads, window, (0, 0), None, self.scale, dropout, "timm", padding
        )  # [B, H, W, C]
        return self.proj_drop(self.proj(x.flatten(1, 2)))


class FastNestAttention(Replacement, Attention):
    """Blocks of tokens [B, T, N, C] as a map of T rows, each row a window."""

    source = Attention

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, attn_drop=nn.Dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super().forward(x)
        dropout = attention_dropout(self.attn_drop.p, self.attn_drop.training)
        window = (1, x.shape[2])
        x = window_attention(self.qkv(x), self.num_heads, window, scale=self.scale, dropout=dropout)  # [B, T, N, C]
        x = x.unflatten(3, (self.num_heads, -1)).transpose(3, 4).flatten(3)  # channels [d][head], as NesT has them
        return self.proj_drop(self.proj(x))
