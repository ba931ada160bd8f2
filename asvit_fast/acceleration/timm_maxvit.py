"""Replacements for the channels-last window and grid attention of timm's MaxViT (arXiv 2204.01697)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.maxxvit import AttentionCl, ParallelPartitionAttention, PartitionAttentionCl
from torch import Tensor

from ..ops.window_attention import window_attention
from .computing import attention_drops, by_projection, divides, drop_probability, project, window_dropout
from .replacement import DROP, LINEAR, Names, Parts, Replacement


def _parts(name: str) -> Parts:
    """Parts of the attention of that name."""
    return {
        name: (AttentionCl,),
        f"{name}.qkv": LINEAR,
        f"{name}.rel_pos": (RelPosBias, RelPosBiasTf, RelPosMlp, type(None)),
        f"{name}.attn_drop": DROP,
        f"{name}.proj": LINEAR,
        f"{name}.proj_drop": DROP,
    }


def _reads(name: str) -> tuple[str, ...]:
    """Attributes of the attention of that name."""
    return tuple(f"{name}.{attribute}" for attribute in ("head_first", "num_heads", "fused_attn", "scale"))


def _attend(attn: Any, x: Tensor, window: tuple[int, int], layout: str) -> Tensor:
    """A map [B, H, W, C] -> [B, H, W, Cout]."""
    qkv = project(attn.qkv, x)  # [B, H, W, 3*heads*d]
    if attn.head_first:
        qkv = by_projection(qkv, attn.num_heads)
    bias = None if attn.rel_pos is None else attn.rel_pos.get_bias().flatten(0, -3)  # [heads, N, N]
    scale = None if attn.fused_attn else attn.scale
    x = window_attention(qkv, attn.num_heads, window, (0, 0), bias, scale, 0.0, layout)  # [B, H, W, heads*d]
    return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, (0, 0), layout)


class FastPartitionAttentionCl(Replacement, PartitionAttentionCl):
    """Computes the attention of whole maps, which the source refuses unless windows divide them, with the weights of
    its `attn`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("partition_size", "partition_block", *_reads("attn"))
    parts: ClassVar[Parts] = _parts("attn")

    def _partition_attn(self, x: Tensor) -> Tensor:
        if not divides(self.partition_size, x) or not self.can_run() or attention_drops(self.attn):
            return super()._partition_attn(x)
        return _attend(self.attn, x, self.partition_size, "masked" if self.partition_block else "grid")


class FastParallelPartitionAttention(Replacement, ParallelPartitionAttention):
    """The same with both of its attentions."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("partition_size", *_reads("attn_block"), *_reads("attn_grid"))
    parts: ClassVar[Parts] = {**_parts("attn_block"), **_parts("attn_grid")}

    def _partition_attn(self, x: Tensor) -> Tensor:
        window = self.partition_size
        runs = divides(window, x) and self.can_run()
        if not runs or attention_drops(self.attn_block) or attention_drops(self.attn_grid):
            return super()._partition_attn(x)
        block = _attend(self.attn_block, x, window, "masked")
        return torch.cat([block, _attend(self.attn_grid, x, window, "grid")], dim=-1)
