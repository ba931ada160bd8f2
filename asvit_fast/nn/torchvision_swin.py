"""Replacements for the attention of torchvision's Swin Transformers, which pad a map before they roll it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from ..ops.linear import linear
from ..ops.window_attention import window_attention
from ..ops.windows import window_padding
from .replacement import Replacement, attention_dropout, cosine_attention, padding_token, why_not_bypass


def _shift(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """No shift along an axis that a single window covers."""
    rows, columns = (0 if w >= n + window_padding(n, w) else s for n, w, s in zip(size, window, shift, strict=True))
    return rows, columns


def _attend(attention: Any, project: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
    """Attention of a map x [B, H, W, C] by a module of either version; `project` gives q, k, v of tokens."""
    window = (attention.window_size[0], attention.window_size[1])
    shift = _shift(x.shape[1:3], window, attention.shift_size)
    dropout = attention_dropout(attention.attention_dropout, attention.training)
    padding = padding_token(project, x, window)
    bias = attention.get_relative_position_bias()[0]  # [heads, N, N]
    heads = attention.num_heads
    x = window_attention(project(x), heads, window, shift, bias, scale, dropout, "torchvision", padding)
    x = linear(x, attention.proj.weight, attention.proj.bias)
    return F.dropout(x, p=attention.dropout, training=attention.training)


class FastShiftedWindowAttention(Replacement, ShiftedWindowAttention):
    """[B, H, W, C] -> [B, H, W, C]. Of its Linear layers it uses the weights, as its source does."""

    source = ShiftedWindowAttention

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, qkv=nn.Linear, proj=nn.Linear)

    def _project(self, x: Tensor) -> Tensor:
        return linear(x, self.qkv.weight, self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super().forward(x)
        return _attend(self, self._project, x, (x.shape[3] // self.num_heads) ** -0.5)


class FastShiftedWindowAttentionV2(Replacement, ShiftedWindowAttentionV2):
    """The same with cosine attention; keys have no bias."""

    source = ShiftedWindowAttentionV2

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, qkv=nn.Linear, proj=nn.Linear)

    def _project(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        return cosine_attention(linear(x, self.qkv.weight, bias), self.num_heads, self.logit_scale)

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, self._project, x, 1.0) if self.usable() else super().forward(x)
