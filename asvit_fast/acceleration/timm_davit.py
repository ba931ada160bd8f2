"""Replacement for the window attention of timm's DaViT (arXiv 2204.03645)."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.davit import SpatialBlock, WindowAttention
from torch import Tensor

from ..ops.window_attention import window_attention
from .computing import padding_token, project
from .replacement import LINEAR, SOFTMAX, Names, Parts, Replacement, bypass_reason


class FastSpatialBlock(Replacement, SpatialBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        *("window_size", "ffn", "cpe1", "norm1", "drop_path1", "cpe2", "norm2", "mlp", "drop_path2"),
        *("attn.num_heads", "attn.fused_attn", "attn.scale"),
    )
    parts: ClassVar[Parts] = {
        "attn": (WindowAttention,),
        "attn.qkv": LINEAR,
        "attn.softmax": SOFTMAX,
        "attn.proj": LINEAR,
    }

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not module.ffn:
            return "without a feed-forward network its forward is another"
        return bypass_reason(module, cls.parts)

    def _attend(self, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        attn: Any = self.attn
        padding = padding_token(attn.qkv.bias, x, self.window_size)
        scale = None if attn.fused_attn else attn.scale
        qkv = project(attn.qkv, x)  # [B, H, W, 3*C]
        x = window_attention(qkv, attn.num_heads, self.window_size, scale=scale, layout="timm", padding=padding)
        return project(attn.proj, x)

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        size = x.shape[2:]  # of x [B, C, H, W]
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        attended = self._attend(self.norm1(shortcut).unflatten(1, size))  # [B, H, W, C]
        x = shortcut + self.drop_path1(attended.flatten(1, 2))
        x = self.cpe2(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)  # [B, H*W, C]
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).unflatten(2, size)
