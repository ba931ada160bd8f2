"""Replacement for the blocks of our own network: in inference on a CPU their sums are made in the products before
them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..models.asvit import Block
from ..nn import Linear, WindowAttention
from ..nn.attention import split_attention
from .computing import drop_probability
from .norm_linear import linear_of_norm
from .replacement import DROP, Names, Parts, Replacement
from .residual import feed_forward_onto, joins, project_onto


class FastBlock(Replacement, Block):
    """[B, H, W, dim] -> [B, H, W, dim]."""

    ops = ("window_attention", "linear")
    reads: ClassVar[Names] = (
        *("norm1", "norm2", "mlp", "drop_path1", "drop_path2"),
        "attn.num_heads",
        "attn.splits",
        "attn.window",
        "attn.attn_scale",
    )
    parts: ClassVar[Parts] = {
        "attn": (WindowAttention,),
        "attn.qkv": (Linear,),
        "attn.proj": (Linear,),
        "attn.feat_scale": (nn.Identity,),
        "attn.proj_drop": DROP,
    }

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
        return (
            None if device in ("cpu", "meta") else f"on {device} its attention is fused as it is, its sums are torch's"
        )

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        plain = joins(x, (self.drop_path1, self.drop_path2)) and drop_probability(attn.proj_drop) == 0.0
        if not plain or attn.training or not self.can_run():
            return super().forward(x)
        qkv = linear_of_norm(self.norm1, x, attn.qkv)  # [B, H, W, 3*heads*head_dim]
        y = split_attention(qkv, attn.num_heads, attn.splits, attn.window, 0.0, attn.attn_scale)
        x = project_onto(attn.proj, y, x)
        return feed_forward_onto(self.norm2, self.mlp, x)
