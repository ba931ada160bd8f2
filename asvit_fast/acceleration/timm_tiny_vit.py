"""Replacement for the block of timm's TinyViT (arXiv 2207.10666), whose attention normalises its input, padding
included."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models.tiny_vit import Attention, NormMlp, TinyVitBlock
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .chunked_mlp import ChunkedMlp
from .computing import by_projection, divides, project
from .replacement import LINEAR, Names, Parts, Replacement, bypass_reason


class FastTinyVitBlock(Replacement, TinyVitBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        *("window_size", "drop_path1", "local_conv", "mlp", "drop_path2", "attn.num_heads", "attn.key_dim"),
        *("attn.val_dim", "attn.fused_attn", "attn.scale", "attn.get_attention_biases"),
    )
    parts: ClassVar[Parts] = {
        "attn": (Attention,),
        "attn.norm": (nn.LayerNorm,),
        "attn.qkv": LINEAR,
        "attn.proj": LINEAR,
    }

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        if why is None and module.attn.val_dim != module.attn.key_dim:
            why = f"its values have {module.attn.val_dim} channels per head, its keys {module.attn.key_dim}"
        return why

    def _attend(self, x: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        attn: Any = self.attn
        heads, window = attn.num_heads, (self.window_size, self.window_size)
        bias = attn.get_attention_biases(x.device)  # [heads, N, N]
        # functions in place of modules, which nobody must see called on a token of padding
        qkv = by_projection(project(attn.qkv, attn.norm.forward(x)), heads)  # [B, H, W, 3*heads*d]
        padding = None
        if not divides(window, x):
            zero = x.new_zeros(1, x.shape[3])
            padding = by_projection(project(attn.qkv, attn.norm.forward(zero)), heads)[0].to(qkv.dtype)
        scale = None if attn.fused_attn else attn.scale
        return project(attn.proj, window_attention(qkv, heads, window, (0, 0), bias, scale, 0.0, "timm", padding))

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        x = x + self.drop_path1(self._attend(x))  # [B, H, W, C]
        size = x.shape[1:3]
        x = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)  # [B, H*W, C]
        x = x + self.drop_path2(self.mlp(x))
        return x.unflatten(1, size)


class FastNormMlp(ChunkedMlp, NormMlp):
    """Its feed-forward network."""

    order = ("norm", "fc1", "act", "fc2")
