"""Replacements for timm's Swin Transformer (arXiv 2103.14030): windows are cut, rolled and padded by the kernel."""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .replacement import Replacement, attention_dropout, padding_token, why_not_bypass


class FastWindowAttention(Replacement, WindowAttention):
    """Takes a map [B, H, W, C] if it is given a ``shift``, and windows [B*windows, N, C] as its source does if not."""

    source = WindowAttention
    only_inside = "SwinTransformerBlock"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, softmax=nn.Softmax, attn_drop=nn.Dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: tuple[int, int] | None = None) -> Tensor:
        if shift is None:
            return super().forward(x, mask)
        qkv = self.qkv(x)  # [B, H, W, 3*heads*d]
        padding = padding_token(self.qkv, x, self.window_size)
        bias = self._get_rel_pos_bias()[0]  # [heads, N, N]
        dropout = attention_dropout(self.attn_drop.p, self.attn_drop.training)
        window, heads = self.window_size, self.num_heads
        x = window_attention(qkv, heads, window, shift, bias, self.scale, dropout, "timm", padding)
        return self.proj_drop(self.proj(x))


class FastSwinTransformerBlock(Replacement, SwinTransformerBlock):
    """Hands whole maps to its attention."""

    source = SwinTransformerBlock
    inner = (("attn", FastWindowAttention),)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if tuple(module.window_size) != tuple(module.attn.window_size):
            return f"its windows are {module.window_size}, those of its attention {module.attn.window_size}"
        return None

    def _attn(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super()._attn(x)
        return self.attn(x, shift=self.shift_size)
