"""Windowed multi-head self-attention."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.window_attention import window_attention
from .feat_scale import FeatScale
from .linear import Linear

torch.fx.wrap("split_attention")  # it branches on sizes, which torch.fx does not know while it traces


def split_attention(
    qkv: Tensor,
    num_heads: int,
    splits: int,
    window: tuple[int, int] | None,
    dropout: float,
    attn_scale: Tensor | None = None,
) -> Tensor:
    """Window attention on [B, H, W, 3*heads*d]; without a fixed ``window`` each side of the map is cut in ``splits``
    windows of ceil(side / splits) tokens."""
    if window is None:
        window = (max(-(-qkv.shape[1] // splits), 1), max(-(-qkv.shape[2] // splits), 1))
    return window_attention(qkv, num_heads, window, dropout=dropout, attn_scale=attn_scale)


class WindowAttention(nn.Module):
    """Attention inside non-overlapping windows: [B, H, W, dim] -> [B, H, W, dim] (As-ViT, arXiv 2202.11921, section
    3.1).

    ``head_dim = dim // num_heads``; when heads do not divide the width the inner width ``head_dim * num_heads`` is
    smaller. Windows follow the map (``splits`` per side) until ``window`` fixes them in tokens. ``attn_scale`` and
    ``feat_scale`` add the learned weights of arXiv 2203.05962 against over-smoothing; both start as the identity.
    """

    window: tuple[int, int] | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        splits: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_scale: bool = False,
        feat_scale: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.splits = splits
        self.window = None
        self.attn_drop = attn_drop
        inner_dim = self.head_dim * num_heads
        self.qkv = Linear(dim, 3 * inner_dim, **factory)
        self.proj = Linear(inner_dim, dim, **factory)
        self.attn_scale = nn.Parameter(torch.zeros(num_heads, **factory)) if attn_scale else None
        self.feat_scale = FeatScale(dim, **factory) if feat_scale else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)  # [B, H, W, 3*heads*head_dim]
        dropout = self.attn_drop if self.training else 0.0
        # [B, H, W, heads*head_dim]
        x = split_attention(qkv, self.num_heads, self.splits, self.window, dropout, self.attn_scale)
        return self.proj_drop(self.feat_scale(self.proj(x)))
