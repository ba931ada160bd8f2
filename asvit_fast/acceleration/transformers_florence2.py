"""Replacements for the image encoder of Florence-2 (arXiv 2311.06242) in Hugging Face's transformers, a DaViT."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.florence2.modeling_florence2 import Florence2VisionMLP, Florence2VisionWindowAttention

from ..ops.window_attention import window_attention
from .chunked_mlp import ChunkedMlp
from .computing import padding_token, project
from .replacement import LINEAR, Names, Parts, Replacement
from .transformers_layers import implementation_reason


class FastFlorence2VisionWindowAttention(Replacement, Florence2VisionWindowAttention):
    """[B, H, W, C] -> [B, H*W, C]."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = ("window_size", "num_heads", "scale", "config", "is_causal")
    parts: ClassVar[Parts] = {"qkv": LINEAR, "proj": LINEAR}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return super().unsupported_reason(module) or implementation_reason(module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(hidden_states)
        window = (self.window_size, self.window_size)
        padding = padding_token(self.qkv.bias, hidden_states, window)
        qkv = project(self.qkv, hidden_states)  # [B, H, W, 3*C]
        x = window_attention(qkv, self.num_heads, window, scale=self.scale, layout="timm", padding=padding)
        return project(self.proj, x).flatten(1, 2)


class FastFlorence2VisionMLP(ChunkedMlp, Florence2VisionMLP):
    """Its feed-forward network."""

    order = ("fc1", "activation_fn", "fc2")
