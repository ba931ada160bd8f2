"""Replacements for the modules of torchvision's Swin Transformers, which pad a map before they roll it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops.misc import MLP

from ..ops.linear import linear
from ..ops.position_bias import position_bias
from ..ops.window_attention import Projections, window_attention
from ..ops.windows import window_padding
from .chunked_mlp import ChunkedMlp
from .computing import cosine_projections, cosine_scale, drops, padding_token, project, window_dropout
from .merging import Merging
from .replacement import LINEAR, Names, Parts, Replacement, bypass_reason
from .shifts import window_reason


def _shift(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[int, ...]:
    """No shift along an axis that a single window covers."""
    return tuple(0 if w >= n + window_padding(n, w) else s for n, w, s in zip(size, window, shift, strict=True))


def attend(
    attention: Any,
    qkv: Projections,
    window: Sequence[int],
    shift: Sequence[int],
    bias: Tensor,
    scale: float | Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Attention inside the windows of a map by a module of any version: qkv [B, *size, 3*C], or three times [B, *size,
    C] -> [B, *size, C].

    Args:
        bias: of positions, [heads, N, N].
        scale: one, or [heads].
        padding: a token of padding in qkv, [3*C], or None.
    """
    window, shift = tuple(window), tuple(shift)
    x = window_attention(qkv, attention.num_heads, window, shift, bias, scale, 0.0, "torchvision", padding)
    probability = attention.dropout if attention.training else 0.0
    return window_dropout(project(attention.proj, x), probability, window, shift, "torchvision")


def _position_bias(attention: Any, table: Tensor) -> Tensor:
    """[heads, N, N] of a table [offsets, heads]."""
    tokens = math.prod(attention.window_size)
    return position_bias(table, attention.relative_position_index.reshape(tokens, tokens))


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

    reads: ClassVar[Names] = (*MapAttention.reads, "relative_position_bias_table", "relative_position_index")
    bypassed = ("get_relative_position_bias",)

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or drops(self.attention_dropout, self.training):
            return super().forward(x)
        window = self.window_size
        bias = _position_bias(self, self.relative_position_bias_table)
        shift = _shift(x.shape[1:3], window, self.shift_size)
        scale = (x.shape[3] // self.num_heads) ** -0.5
        padding = padding_token(self.qkv.bias, x, window)
        return attend(self, project(self.qkv, x), window, shift, bias, scale, padding)


class FastShiftedWindowAttentionV2(MapAttention, ShiftedWindowAttentionV2):
    """The same with cosine attention; keys have no bias."""

    reads: ClassVar[Names] = (
        *MapAttention.reads, "logit_scale", "cpb_mlp", "relative_coords_table", "relative_position_index",
    )  # fmt: skip
    bypassed = ("get_relative_position_bias",)

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or drops(self.attention_dropout, self.training):
            return super().forward(x)
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))
        of_positions = _position_bias(self, table)
        bias = self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        qkv = linear(x, self.qkv.weight, bias)  # [B, H, W, 3*C]
        window, shift = self.window_size, _shift(x.shape[1:3], self.window_size, self.shift_size)
        padding = padding_token(bias, x, window)
        if padding is not None:
            padding = torch.cat(cosine_projections(padding.to(qkv.dtype), self.num_heads))
        maps, scale = cosine_projections(qkv, self.num_heads), cosine_scale(self.logit_scale)
        return attend(self, maps, window, shift, of_positions, scale, padding)


class FastTorchvisionPatchMerging(Merging, PatchMerging):
    """[..., H, W, C] -> [..., ceil(H/2), ceil(W/2), 2*C]: of a video, image by image."""

    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 4 or not self.can_run():
            return super().forward(x)
        return self._merge(x.flatten(0, -4)).unflatten(0, x.shape[:-3])


class FastTorchvisionMLP(ChunkedMlp, MLP):
    """Its feed-forward network."""

    def _in_order(self) -> list[nn.Module]:
        return [*self]
