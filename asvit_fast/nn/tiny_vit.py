"""Replacements for timm's TinyViT (arXiv 2207.10666), whose attention normalises its input, padding included."""

from __future__ import annotations

from typing import Any

from timm.models.tiny_vit import Attention, TinyVitBlock
from torch import Tensor

from ..ops.window_attention import window_attention
from .replacement import Replacement, by_projection, padding_token


class FastTinyVitAttention(Replacement, Attention):
    """Takes a map [B, H, W, C] if it is given a ``window``, and windows [B*windows, N, C] as its source does if not."""

    source = Attention
    only_inside = "TinyVitBlock"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if module.val_dim != module.key_dim:
            return f"its values have {module.val_dim} channels per head, its keys {module.key_dim}"
        return None

    def forward(self, x: Tensor, window: tuple[int, int] | None = None) -> Tensor:
        if window is None:
            return super().forward(x)
        heads = self.num_heads
        qkv = by_projection(self.qkv(self.norm(x)), heads)  # [B, H, W, 3*heads*d]
        padding = padding_token(self.qkv, x, window, self.norm)
        if padding is not None:
            padding = by_projection(padding, heads)
        bias = self.get_attention_biases(x.device)  # [heads, N, N]
        return self.proj(window_attention(qkv, heads, window, (0, 0), bias, self.scale, 0.0, "timm", padding))


class FastTinyVitBlock(Replacement, TinyVitBlock):
    """Hands whole maps to its attention."""

    source = TinyVitBlock
    inner = (("attn", FastTinyVitAttention),)

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super().forward(x)
        x = x + self.drop_path1(self.attn(x, window=(self.window_size, self.window_size)))  # [B, H, W, C]
        size = x.shape[1:3]
        x = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)  # [B, H*W, C]
        x = x + self.drop_path2(self.mlp(x))
        return x.unflatten(1, size)
