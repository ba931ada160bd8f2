"""Replacements for the blocks of timm's two versions of Swin Transformer V2 (arXiv 2111.09883)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor

from ..ops.linear import linear
from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from .computing import cosine_projections, cosine_scale, drop_probability, padding_token, project, window_dropout
from .replacement import DROP, LINEAR, SOFTMAX, Names, Parts
from .timm_swin import ShiftedWindows

ATTENTION = {"attn.qkv": LINEAR, "attn.attn_drop": DROP, "attn.proj": LINEAR, "attn.proj_drop": DROP}


def _attend(block: Any, qkv: Tensor, qkv_bias: Tensor | None, position_bias: Callable[[], Tensor]) -> Tensor:
    """Cosine attention inside the windows of a map: qkv [B, H, W, 3*heads*d] -> [B, H, W, C].

    Args:
        qkv_bias: what the projection makes of a token of zeros, [3*heads*d].
        position_bias: gives [heads, N, N].
    """
    attn, window, shift = block.attn, block.window_size, block.shift_size
    heads, scale = attn.num_heads, cosine_scale(attn.logit_scale)
    padding = padding_token(qkv_bias, qkv, window)
    if padding is not None:
        padding = torch.cat(cosine_projections(padding.to(qkv.dtype), heads))
    maps = cosine_projections(qkv, heads)  # [B, H, W, C] each
    x = window_attention(maps, heads, window, shift, position_bias(), scale, 0.0, "timm", padding)
    return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, shift)


class FastSwinTransformerV2Block(ShiftedWindows, SwinTransformerV2Block):
    """Computes the attention of whole maps with the weights of its `attn`."""

    reads: ClassVar[Names] = (
        *(*ShiftedWindows.reads, "input_resolution"),
        *(f"attn.{name}" for name in ("logit_scale", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "cpb_mlp")),
        *(f"attn.{name}" for name in ("relative_coords_table", "relative_position_index")),
    )
    parts: ClassVar[Parts] = {"attn": (WindowAttention,), "attn.softmax": SOFTMAX, **ATTENTION}

    def _position_bias(self) -> Tensor:
        attn: Any = self.attn
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, -2))  # [offsets, heads]
        return position_bias(table, attn.relative_position_index)  # of an index [N, N]

    def _attn(self, x: Tensor) -> Tensor:
        if not self.can_run_on(x):
            return super()._attn(x)
        attn: Any = self.attn
        bias = attn.qkv.bias
        if attn.q_bias is None:
            qkv = project(attn.qkv, x)  # [B, H, W, 3*heads*d]
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            separate = attn.qkv_bias_separate
            qkv = project(attn.qkv, x) + bias if separate else linear(x, attn.qkv.weight, bias)
        return _attend(self, qkv, bias, self._position_bias)


class FastSwinTransformerV2CrBlock(ShiftedWindows, SwinTransformerV2CrBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    reads: ClassVar[Names] = (
        *ShiftedWindows.reads,
        "feat_size",
        "attn.logit_scale",
        "attn._relative_positional_encodings",
    )
    map_size = "feat_size"
    parts: ClassVar[Parts] = {"attn": (WindowMultiHeadAttention,), **ATTENTION}

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        if not self.can_run_on(x):
            return super()._shifted_window_attn(x)
        attn: Any = self.attn
        qkv = project(attn.qkv, x)  # [B, H, W, 3*heads*d]
        return _attend(self, qkv, attn.qkv.bias, lambda: attn._relative_positional_encodings()[0])
