"""Replacements for the modules of torchvision's Swin Transformers, which pad a map before they roll it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops.misc import MLP

from ..ops.linear import linear
from ..ops.window_attention import window_attention
from ..ops.windows import window_padding
from .chunked_mlp import ChunkedMlp
from .merging import Merging
from .replacement import (
    LINEAR,
    Names,
    Parts,
    Replacement,
    bypass_reason,
    cosine_attention,
    drops,
    padding_token,
    project,
    window_dropout,
)
from .shifts import window_reason


def _shift(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """No shift along an axis that a single window covers."""
    rows, columns = (0 if w >= n + window_padding(n, w) else s for n, w, s in zip(size, window, shift, strict=True))
    return rows, columns


def _attend(attention: Any, qkv: Tensor, padding: Tensor | None, bias: Tensor, scale: float) -> Tensor:
    """Attention inside the windows of a map by a module of either version: qkv [B, H, W, 3*C] -> [B, H, W, C].

    Args:
        padding: a token of padding in qkv, [3*C], or None.
        bias: of positions, [heads, N, N].
    """
    window = (attention.window_size[0], attention.window_size[1])
    shift = _shift(qkv.shape[1:3], window, attention.shift_size)
    x = window_attention(qkv, attention.num_heads, window, shift, bias, scale, 0.0, "torchvision", padding)
    probability = attention.dropout if attention.training else 0.0
    return window_dropout(project(attention.proj, x), probability, window, shift, "torchvision")


class MapAttention(Replacement):
    """Base class of both versions."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        "window_size", "shift_size", "num_heads", "attention_dropout", "dropout", "get_relative_position_bias",
    )  # fmt: skip
    parts: ClassVar[Parts] = {"qkv": LINEAR, "proj": LINEAR}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return bypass_reason(module, cls.parts) or window_reason(module.window_size, module.shift_size)


class FastShiftedWindowAttention(MapAttention, ShiftedWindowAttention):
    """[B, H, W, C] -> [B, H, W, C]. Of its Linear layers it uses the weights, as its source does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or drops(self.attention_dropout, self.training):
            return super().forward(x)
        bias = self.get_relative_position_bias()[0]  # [heads, N, N]
        padding = padding_token(self.qkv.bias, x, (self.window_size[0], self.window_size[1]))
        return _attend(self, project(self.qkv, x), padding, bias, (x.shape[3] // self.num_heads) ** -0.5)


class FastShiftedWindowAttentionV2(MapAttention, ShiftedWindowAttentionV2):
    """The same with cosine attention; keys have no bias."""

    reads: ClassVar[Names] = (*MapAttention.reads, "logit_scale")

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or drops(self.attention_dropout, self.training):
            return super().forward(x)
        position_bias = self.get_relative_position_bias()[0]  # [heads, N, N]
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        qkv = linear(x, self.qkv.weight, bias)  # [B, H, W, 3*C]
        logit_scale = self.logit_scale  # once, as it may be parametrized
        padding = padding_token(bias, x, (self.window_size[0], self.window_size[1]))
        if padding is not None:
            padding = cosine_attention(padding.to(qkv.dtype), self.num_heads, logit_scale)
        return _attend(self, cosine_attention(qkv, self.num_heads, logit_scale), padding, position_bias, 1.0)


class FastTorchvisionPatchMerging(Merging, PatchMerging):
    """[..., H, W, C] -> [..., ceil(H/2), ceil(W/2), 2*C]."""

    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(x) if x.dim() == 4 and self.can_run() else super().forward(x)


class FastTorchvisionMLP(ChunkedMlp, MLP):
    """Its feed-forward network."""
