"""Replacements for the window attention of timm's DaViT (arXiv 2204.03645)."""

from __future__ import annotations

from typing import Any

from timm.models.davit import SpatialBlock, WindowAttention
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .replacement import Replacement, padding_token, why_not_bypass


class FastDavitWindowAttention(Replacement, WindowAttention):
    """Takes a map [B, H, W, C] if it is given a ``window``, and windows [B*windows, N, C] as its source does if not."""

    source = WindowAttention
    only_inside = "SpatialBlock"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, softmax=nn.Softmax)

    def forward(self, x: Tensor, window: tuple[int, int] | None = None) -> Tensor:
        if window is None:
            return super().forward(x)
        padding = padding_token(self.qkv, x, window)
        x = window_attention(
            self.qkv(x), self.num_heads, window, scale=self.scale, layout="timm", padding=padding
        )  # [B, H, W, C]
        return self.proj(x)


class FastSpatialBlock(Replacement, SpatialBlock):
    """Hands whole maps to its attention."""

    source = SpatialBlock
    inner = (("attn", FastDavitWindowAttention),)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return None if module.ffn else "without a feed-forward network its forward is another"

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super().forward(x)
        size = x.shape[2:]  # of x [B, C, H, W]
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        attended = self.attn(self.norm1(shortcut).unflatten(1, size), window=self.window_size)  # [B, H, W, C]
        x = shortcut + self.drop_path1(attended.flatten(1, 2))
        x = self.cpe2(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)  # [B, H*W, C]
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).unflatten(2, size)
