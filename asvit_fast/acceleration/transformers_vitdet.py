"""Replacement for the layer of ViTDet (arXiv 2203.16527) in Hugging Face's transformers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.vitdet.modeling_vitdet import VitDetAttention, VitDetLayer

from ..ops.window_attention import window_attention
from .computing import padding_token, project
from .replacement import LINEAR, Names, Parts, Replacement
from .transformers_layers import wanted_reason, warn_wanted

OPTIONS = tuple(inspect.signature(VitDetLayer.forward).parameters)[2:]


class FastVitDetLayer(Replacement, VitDetLayer):
    """Computes the attention of whole maps [B, C, H, W] with the weights of its `attention`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        *("window_size", "use_residual_block", "norm1", "norm2", "mlp", "drop_path"),
        *("attention.num_heads", "attention.scale", "attention.use_relative_position_embeddings"),
    )
    parts: ClassVar[Parts] = {"attention": (VitDetAttention,), "attention.qkv": LINEAR, "attention.proj": LINEAR}

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        if module.window_size == 0:
            return "it attends to the whole map"
        return "its bias depends on the query" if module.attention.use_relative_position_embeddings else None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return cls.skip_reason(module) or super().unsupported_reason(module)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        why = wanted_reason(dict(zip(OPTIONS, args, strict=False)) | kwargs)
        if why is not None:
            warn_wanted(self.source.__name__, why)
        if why is not None or not self.can_run():
            return super().forward(hidden_states, *args, **kwargs)
        attention, window = self.attention, (self.window_size, self.window_size)
        shortcut = hidden_states.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = self.norm1(shortcut)
        padding = padding_token(attention.qkv.bias, x, window)
        qkv = project(attention.qkv, x)  # [B, H, W, 3*C]
        x = window_attention(qkv, attention.num_heads, window, scale=attention.scale, layout="timm", padding=padding)
        x = shortcut + self.drop_path(project(attention.proj, x))
        x = (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)
        return (self._modules["residual"](x) if self.use_residual_block else x,)
