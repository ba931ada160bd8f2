"""Replacement for the block of SAM 2's image encoder (arXiv 2408.00714) in Hugging Face's transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, Sam2MultiScaleBlock

from ..ops.window_attention import window_attention
from .computing import padding_token, project
from .replacement import LINEAR, Names, Parts, Replacement
from .transformers_layers import implementation_reason


class FastSam2MultiScaleBlock(Replacement, Sam2MultiScaleBlock):
    """Computes the attention of whole maps [B, H, W, C] with the weights of its `attn`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        *("window_size", "query_stride", "dim", "dim_out", "layer_norm1", "layer_norm2", "mlp"),
        *("attn.num_attention_heads", "attn.scale", "attn.config", "attn.is_causal"),
    )
    parts: ClassVar[Parts] = {"attn": (Sam2MultiScaleAttention,), "attn.qkv": LINEAR, "attn.proj": LINEAR}

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        if module.window_size == 0:
            return "it attends to the whole map"
        return "it pools its queries" if module.query_stride or module.dim != module.dim_out else None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return cls.skip_reason(module) or super().unsupported_reason(module) or implementation_reason(module.attn)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self.can_run():
            return super().forward(hidden_states, **kwargs)
        attn, window = self.attn, (self.window_size, self.window_size)
        x = self.layer_norm1(hidden_states)
        padding = padding_token(attn.qkv.bias, x, window)
        qkv = project(attn.qkv, x)  # [B, H, W, 3*C]
        x = window_attention(qkv, attn.num_attention_heads, window, scale=attn.scale, layout="timm", padding=padding)
        x = hidden_states + project(attn.proj, x)
        return x + self.mlp(self.layer_norm2(x))
