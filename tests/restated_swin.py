"""The interfaces of Swin Transformers that are no packages, in our own words: the same attributes and calls, the same
numbers, for windows of any number of axes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_fast.ops.windows import merge_windows, partition_windows, window_mask


def offsets(queries: list[int], keys: list[int]) -> Tensor:
    """The offset of every pair of tokens of two windows, counted from 0, as a number [queries, keys]."""
    index = torch.zeros(1, 1, dtype=torch.int64)
    for n, m in zip(queries, keys, strict=True):
        along = torch.arange(n)[:, None] - torch.arange(m) + m - 1  # [n, m]
        index = index[:, None, :, None] * (n + m - 1) + along[None, :, None, :]
        index = index.flatten(2, 3).flatten(0, 1)
    return index


def padded(x: Tensor, window: list[int]) -> Tensor:
    """[B, *size, C] with zeros at the end until windows divide it."""
    rest = [-n % w for n, w in zip(x.shape[1:-1], window, strict=True)]
    return F.pad(x, [0, 0, *(amount for extra in reversed(rest) for amount in (0, extra))])


def shift_mask(size: list[int], window: list[int], shift: list[int]) -> Tensor | None:
    size = [n + -n % w for n, w in zip(size, window, strict=True)]
    return window_mask(size, window, shift, torch.float32, torch.device("cpu"), "timm")


class Attention(nn.Module):
    """Of the tokens of windows [windows, tokens, C]."""

    def __init__(self, channels: int, window: tuple[int, ...], heads: int, indexed: bool = False):
        super().__init__()
        self.window_size, self.num_heads, self.scale = window, heads, 0.3
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.randn(math.prod(2 * n - 1 for n in window), heads))
        if not indexed:
            self.register_buffer("relative_position_index", offsets(list(window), list(window)))
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(0.0), nn.Dropout(0.0), nn.Softmax(-1)

    def bias(self, tokens: int, index: Tensor | None) -> Tensor:
        index = self.relative_position_index if index is None else index
        return self.relative_position_bias_table[index[:tokens, :tokens]].permute(2, 0, 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * self.scale

    def project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def forward(self, x: Tensor, mask: Tensor | None = None, rpi: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k) + self.bias(x.shape[1], rpi)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask.to(x.dtype)[:, None]).flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class CosineAttention(Attention):
    def __init__(self, channels: int, window: tuple[int, ...], heads: int):
        super().__init__(channels, window, heads)
        del self.relative_position_bias_table, self.scale
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.randn(channels))
        self.logit_scale = nn.Parameter(torch.randn(heads, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, heads, bias=False))
        sides = [torch.arange(1.0 - n, n) / n for n in window]
        self.register_buffer("relative_coords_table", torch.stack(torch.meshgrid(sides, indexing="ij"), -1)[None])

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def bias(self, tokens: int, index: Tensor | None) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * torch.sigmoid(table[self.relative_position_index]).permute(2, 0, 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (
            F.normalize(q, dim=-1)
            @ F.normalize(k, dim=-1).transpose(-2, -1)
            * self.logit_scale.clamp(max=math.log(100.0)).exp()
        )


def windowed(attention: Any, x: Tensor, window: list[int], shift: list[int], mask: Any, *args: Any) -> Tensor:
    """An attention of windows on a map [B, *size, C]."""
    size = list(x.shape[1:-1])
    x = padded(x, window)
    cut = partition_windows(x, window, shift, "torchvision")  # [B, windows, tokens, C]
    out = attention(cut.flatten(0, 1), mask, *args).unflatten(0, cut.shape[:2])
    out = merge_windows(out, list(x.shape[1:-1]), window, shift, "torchvision")
    for axis, n in enumerate(size):
        out = out.narrow(1 + axis, 0, n)
    return out


class Block(nn.Module):
    """What all blocks have."""

    def __init__(self, channels: int, window: Any, shift: Any, attention: nn.Module):
        super().__init__()
        self.window_size, self.shift_size, self.attn = window, shift, attention
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.drop_path = nn.Identity()

    def attended(self, x: Tensor, size: Any, mask: Any, *args: Any) -> Tensor:
        """Tokens [B, H*W, C]."""
        window, shift = [self.window_size] * 2, [self.shift_size] * 2
        mask = mask if self.shift_size else None
        return windowed(self.attn, x.unflatten(1, size), window, shift, mask, *args).flatten(1, 2)

    def finished(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Sized(Block):
    """Microsoft's: maps of one size."""

    def __init__(self, channels: int, size: tuple[int, int], window: int, shift: int, kind: Any = Attention):
        super().__init__(channels, window, shift, kind(channels, (window, window), 2))
        self.input_resolution = size
        self.register_buffer("attn_mask", shift_mask(list(size), [window] * 2, [shift] * 2) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attended(self.norm1(x), self.input_resolution, self.attn_mask)
        return self.finished(x + self.drop_path(attended))


class SizedV2(Sized):
    def __init__(self, channels: int, size: tuple[int, int], window: int, shift: int):
        super().__init__(channels, size, window, shift, CosineAttention)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attended(x, self.input_resolution, self.attn_mask)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class AnySize(Sized):
    """SwinIR's."""

    def calculate_mask(self, x_size: Any) -> Tensor | None:
        return shift_mask(list(x_size), [self.window_size] * 2, [self.shift_size] * 2)

    def forward(self, x: Tensor, x_size: Any) -> Tensor:
        attended = self.attended(self.norm1(x), tuple(x_size), self.calculate_mask(x_size))
        return self.finished(x + self.drop_path(attended))


class Backbone(Block):
    """Of detection and segmentation."""

    def __init__(self, channels: int, window: int, shift: int):
        super().__init__(channels, window, shift, Attention(channels, (window, window), 2))
        self.H: int | None = None
        self.W: int | None = None

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        return self.finished(x + self.drop_path(self.attended(self.norm1(x), (self.H, self.W), mask_matrix)))


class Stage(nn.Module):
    def __init__(self, channels: int, window: int):
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint, self.downsample = window, window // 2, False, None
        self.blocks = nn.ModuleList(Backbone(channels, window, shift) for shift in (0, window // 2))

    def forward(self, x: Tensor, H: int, W: int) -> tuple[Any, ...]:
        mask = shift_mask([H, W], [self.window_size] * 2, [self.shift_size] * 2)
        for block in self.blocks:
            block.H, block.W = H, W
            x = block(x, mask)
        return x, H, W, x, H, W


def clipped(size: Any, window: Any, shift: Any) -> tuple[list[int], list[int]]:
    fitting = [min(n, w) for n, w in zip(size, window, strict=True)]
    return fitting, [0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True)]


class VideoBlock(Block):
    def __init__(self, channels: int, window: Any, shift: Any):
        super().__init__(channels, window, shift, Attention(channels, window, 2))

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        window, shift = clipped(x.shape[1:-1], self.window_size, self.shift_size)
        return windowed(self.attn, self.norm1(x), window, shift, mask_matrix if any(shift) else None)

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        return self.finished(x + self.drop_path(self.forward_part1(x, mask_matrix)))


class VideoStage(nn.Module):
    def __init__(self, channels: int, window: Any):
        super().__init__()
        self.window_size, self.shift_size = window, tuple(w // 2 for w in window)
        self.downsample = None
        self.blocks = nn.ModuleList(VideoBlock(channels, window, shift) for shift in ((0, 0, 0), self.shift_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        mask = shift_mask(list(x.shape[1:-1]), *clipped(x.shape[1:-1], self.window_size, self.shift_size))
        for block in self.blocks:
            x = block(x, mask)
        return x.movedim(-1, 1)


class Hybrid(Block):
    """HAT's: with a convolution beside attention, index and mask handed in."""

    def __init__(self, channels: int, window: int, shift: int):
        super().__init__(channels, window, shift, Attention(channels, (window, window), 2, indexed=True))
        self.conv_block, self.conv_scale = nn.Conv2d(channels, channels, 3, padding=1), 0.1

    def forward(self, x: Tensor, x_size: Any, rpi_sa: Tensor, attn_mask: Tensor | None) -> Tensor:
        tokens = self.norm1(x)
        convolved = self.conv_block(tokens.unflatten(1, x_size).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = x + self.drop_path(self.attended(tokens, x_size, attn_mask, rpi_sa)) + convolved * self.conv_scale
        return self.finished(x)


class Overlapping(Block):
    """HAT's attention to larger windows, whose keys beyond the map are zeros."""

    def __init__(self, channels: int, window: int, around: int):
        super().__init__(channels, window, 0, nn.Identity())
        self.dim, self.overlap_win_size, self.num_heads, self.scale = channels, around, 2, 0.3
        self.qkv, self.proj, self.softmax = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
            nn.Softmax(-1),
        )
        self.unfold = nn.Unfold((around, around), stride=window, padding=(around - window) // 2)
        self.relative_position_bias_table = nn.Parameter(torch.randn((window + around - 1) ** 2, 2))

    def forward(self, x: Tensor, x_size: Any, rpi: Tensor) -> Tensor:
        side, heads = self.window_size, self.num_heads
        q, *keys = self.qkv(self.norm1(x)).unflatten(1, x_size).chunk(3, -1)
        q = partition_windows(q, [side] * 2, [0, 0]).unflatten(-1, (heads, -1)).transpose(2, 3)
        k, v = (
            self.unfold(y.permute(0, 3, 1, 2))
            .unflatten(1, (heads, -1, self.overlap_win_size**2))
            .permute(0, 4, 1, 3, 2)
            for y in keys
        )  # [B, windows, heads, keys, d]
        scores = q @ k.transpose(-2, -1) * self.scale + self.relative_position_bias_table[rpi].permute(2, 0, 1)
        out = (self.softmax(scores) @ v).transpose(2, 3).flatten(3)
        x = self.proj(merge_windows(out, list(x_size), [side] * 2, [0, 0]).flatten(1, 2)) + x
        return x + self.mlp(self.norm2(x))


class Shifted(nn.Module):
    """OpenMMLab's."""

    def __init__(self, channels: int, window: int, shift: int, kind: Any = Attention):
        super().__init__()
        self.window_size, self.shift_size, self.drop = window, shift, nn.Identity()
        self.w_msa = kind(channels, (window, window), 2)

    def forward(self, query: Tensor, hw_shape: Any) -> Tensor:
        window, shift = [self.window_size] * 2, [self.shift_size] * 2
        mask = shift_mask(list(hw_shape), window, shift) if self.shift_size else None
        return self.drop(windowed(self.w_msa, query.unflatten(1, hw_shape), window, shift, mask).flatten(1, 2))


class SmallMaps(Shifted):
    """That of classifiers: no shift on a map of one window."""

    def __init__(self, channels: int, window: int, shift: int, kind: Any = Attention):
        super().__init__(channels, window, shift, kind)
        self.pad_small_map = False

    def forward(self, query: Tensor, hw_shape: Any) -> Tensor:
        shift = 0 if min(hw_shape) == self.window_size else self.shift_size
        window, mask = [self.window_size] * 2, None
        if shift:
            mask = shift_mask(list(hw_shape), window, [shift] * 2)
        return self.drop(windowed(self.w_msa, query.unflatten(1, hw_shape), window, [shift] * 2, mask).flatten(1, 2))
