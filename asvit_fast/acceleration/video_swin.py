"""Replacements for Video Swin Transformer (arXiv 2106.13230), as in SwinTransformer/Video-Swin-Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .computing import token_major, with_token_major_gradient
from .merging import Merging
from .microsoft_detection import blocks_reason
from .replacement import LINEAR, Parts, bypass_reason
from .shift_masks import OF_SHIFT, Mask, is_of_shift, mask_tensor
from .shifts import window_reason
from .structure import Structural, Structure
from .swin_layers import attend, attention_drops, attention_parts, attention_reads, attention_reason

FILE = "SwinTransformer/Video-Swin-Transformer mmaction/models/backbones/swin_transformer.py"


def clipped(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Windows that are not larger than the map; no shift along an axis that one covers."""
    fitting = tuple(min(n, w) for n, w in zip(size, window, strict=True))
    return fitting, tuple(0 if n <= w else s for n, w, s in zip(size, window, shift, strict=True))


class FastVideoSwinBlock(Structural):
    """Computes the attention of whole maps [B, D, H, W, C] with the weights of its `attn`."""

    window_size: tuple[int, int, int]
    shift_size: tuple[int, int, int]

    ops = ("window_attention",)
    origin = f"{FILE}: SwinTransformerBlock3D"
    structure: ClassVar[Structure] = {
        "": {"forward_part1": ("da47a017ddf2bc1c",)},
        "attn": {"forward": ("db4afdc024fa8dec",)},
    }
    reads = ("window_size", "shift_size", "norm1", *attention_reads(), "attn.relative_position_index")
    parts: ClassVar[Parts] = attention_parts()

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window = module.window_size
        why = bypass_reason(module, cls.parts) or window_reason(window, module.shift_size)
        return why or attention_reason(module.attn, window)

    def forward_part1(self: Any, x: Tensor, mask_matrix: Mask) -> Tensor:
        size = tuple(x.shape[1:-1])
        window, shift = clipped(size, self.window_size, self.shift_size)
        runs = self.can_run() and not attention_drops(self.attn)
        if not runs or not is_of_shift(self.source.__name__, mask_matrix, size, window, shift):
            return self.source.forward_part1(self, x, mask_tensor(mask_matrix, size, window, shift, x))
        return attend(self.attn, self.norm1(x), window, shift)


class FastVideoSwinStage(Structural):
    """Computes no mask where its blocks need none; [B, C, D, H, W] -> the same, or merged."""

    origin = f"{FILE}: BasicLayer"
    structure: ClassVar[Structure] = {"": {"forward": ("7ef7487fd9c63bc3",)}}
    reads = ("blocks", "downsample", "window_size", "shift_size")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return blocks_reason(module.blocks)

    def forward(self: Any, x: Tensor) -> Tensor:
        alike = all(
            isinstance(block, FastVideoSwinBlock)
            and tuple(block.window_size) == tuple(self.window_size)
            and (not any(block.shift_size) or tuple(block.shift_size) == tuple(self.shift_size))
            for block in self.blocks
        )
        if not alike or not self.can_run():
            return self.source.forward(self, x)
        x = token_major(x.movedim(1, -1))
        for block in self.blocks:
            x = block(x, OF_SHIFT)
        if self.downsample is not None:
            x = self.downsample(x)
        return with_token_major_gradient(x).movedim(-1, 1)


class FastVideoPatchMerging(Merging, Structural):
    """[B, D, H, W, C] -> [B, D, ceil(H/2), ceil(W/2), 2*C], image by image."""

    origin = f"{FILE}: PatchMerging"
    structure: ClassVar[Structure] = {"": {"forward": ("5c93830878f4d781",)}}
    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() != 5 or not self.can_run():
            return self.source.forward(self, x)
        return self._merge(x.flatten(0, 1)).unflatten(0, x.shape[:2])
