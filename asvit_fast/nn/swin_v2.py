"""Replacements for timm's two versions of Swin Transformer V2 (arXiv 2111.09883)."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor, nn

from ..ops.linear import linear
from ..ops.window_attention import window_attention
from .replacement import Replacement, attention_dropout, cosine_attention, padding_token, why_not_bypass


def _attend(attention: Any, project: Any, x: Tensor, bias: Tensor, shift: tuple[int, int]) -> Tensor:
    """Cosine attention of a map x [B, H, W, C] by a module of either version; `project` gives q, k, v of tokens."""
    heads, window = attention.num_heads, attention.window_size
    qkv = cosine_attention(project(x), heads, attention.logit_scale)  # [B, H, W, 3*heads*d]
    padding = padding_token(project, x, window)
    if padding is not None:
        padding = cosine_attention(padding, heads, attention.logit_scale)
    dropout = attention_dropout(attention.attn_drop.p, attention.attn_drop.training)
    x = window_attention(qkv, heads, window, shift, bias, 1.0, dropout, "timm", padding)
    return attention.proj_drop(attention.proj(x))


class FastWindowAttentionV2(Replacement, WindowAttention):
    """Takes a map [B, H, W, C] if it is given a ``shift``, and windows [B*windows, N, C] as its source does if not."""

    source = WindowAttention
    only_inside = "SwinTransformerV2Block"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, softmax=nn.Softmax, attn_drop=nn.Dropout)

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # type: ignore[arg-type]
        return self.qkv(x) + bias if self.qkv_bias_separate else linear(x, self.qkv.weight, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: tuple[int, int] | None = None) -> Tensor:
        if shift is None:
            return super().forward(x, mask)
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).flatten(0, -2))  # [offsets, heads]
        index: Any = self.relative_position_index  # [N, N]
        return _attend(self, self._project, x, table[index].permute(2, 0, 1), shift)


class FastSwinTransformerV2Block(Replacement, SwinTransformerV2Block):
    """Hands whole maps to its attention."""

    source = SwinTransformerV2Block
    inner = (("attn", FastWindowAttentionV2),)

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x, shift=self.shift_size) if self.usable() else super()._attn(x)


class FastWindowMultiHeadAttention(Replacement, WindowMultiHeadAttention):
    """Takes a map [B, H, W, C] if it is given a ``shift``, and windows [B*windows, N, C] as its source does if not."""

    source = WindowMultiHeadAttention
    only_inside = "SwinTransformerV2CrBlock"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, attn_drop=nn.Dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift: tuple[int, int] | None = None) -> Tensor:
        if shift is None:
            return super().forward(x, mask)
        return _attend(self, self.qkv, x, self._relative_positional_encodings()[0], shift)


class FastSwinTransformerV2CrBlock(Replacement, SwinTransformerV2CrBlock):
    """Hands whole maps to its attention."""

    source = SwinTransformerV2CrBlock
    inner = (("attn", FastWindowMultiHeadAttention),)

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self.attn(x, shift=self.shift_size) if self.usable() else super()._shifted_window_attn(x)
