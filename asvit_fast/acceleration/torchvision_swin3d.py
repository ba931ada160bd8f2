"""Replacement for the attention of torchvision's Video Swin Transformers (arXiv 2106.13230)."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from .computing import drops, padding_token, project
from .torchvision_swin import MapAttention, attend


class FastShiftedWindowAttention3d(MapAttention, ShiftedWindowAttention3d):
    """[B, T, H, W, C] -> [B, T, H, W, C]; where a window would be larger than the map, it is the map."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run() or drops(self.attention_dropout, self.training):
            return super().forward(x)
        size = x.shape[1:4]
        window = [min(n, w) for n, w in zip(size, self.window_size, strict=True)]
        shift = [0 if n <= w else s for n, w, s in zip(size, self.window_size, self.shift_size, strict=True)]
        bias = self.get_relative_position_bias(window)[0]  # [heads, N, N]
        scale = (x.shape[4] // self.num_heads) ** -0.5
        padding = padding_token(self.qkv.bias, x, window)
        return attend(self, project(self.qkv, x), window, shift, bias, scale, padding)
