"""Replacements for the channels-last window and grid attention of timm's MaxViT (arXiv 2204.01697)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.maxxvit import AttentionCl, ParallelPartitionAttention, PartitionAttentionCl
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .replacement import Replacement, attention_dropout, by_projection, why_not_bypass


class FastAttentionCl(Replacement, AttentionCl):
    """Takes a map [B, H, W, C] if it is given a ``window``, and windows as its source does if not."""

    source = AttentionCl
    only_inside = "PartitionAttentionCl or ParallelPartitionAttention"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        positions = (RelPosBias, RelPosBiasTf, RelPosMlp, type(None))
        return why_not_bypass(module, attn_drop=nn.Dropout, rel_pos=positions)

    def forward(
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        window: tuple[int, int] | None = None,
        layout: str = "masked",
    ) -> Tensor:
        if window is None:
            return super().forward(x, shared_rel_pos)
        qkv = self.qkv(x)  # [B, H, W, 3*heads*d]
        if self.head_first:
            qkv = by_projection(qkv, self.num_heads)
        bias = None if self.rel_pos is None else self.rel_pos.get_bias().flatten(0, -3)  # [heads, N, N]
        dropout = attention_dropout(self.attn_drop.p, self.attn_drop.training)
        x = window_attention(qkv, self.num_heads, window, (0, 0), bias, self.scale, dropout, layout)
        return self.proj_drop(self.proj(x))


def _divides(window: tuple[int, int], x: Tensor) -> bool:
    """Whether windows divide a map [B, H, W, C]: the source refuses others."""
    return x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0


class FastPartitionAttentionCl(Replacement, PartitionAttentionCl):
    """Hands whole maps to its attention."""

    source = PartitionAttentionCl
    inner = (("attn", FastAttentionCl),)

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not (_divides(self.partition_size, x) and self.usable()):
            return super()._partition_attn(x)
        return self.attn(x, window=self.partition_size, layout="masked" if self.partition_block else "grid")


class FastParallelPartitionAttention(Replacement, ParallelPartitionAttention):
    """Hands whole maps to both of its attentions."""

    source = ParallelPartitionAttention
    inner = (("attn_block", FastAttentionCl), ("attn_grid", FastAttentionCl))

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not (_divides(self.partition_size, x) and self.usable()):
            return super()._partition_attn(x)
        block = self.attn_block(x, window=self.partition_size, layout="masked")
        grid = self.attn_grid(x, window=self.partition_size, layout="grid")
        return torch.cat([block, grid], dim=-1)
