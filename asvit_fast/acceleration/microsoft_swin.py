"""Replacements for Microsoft's Swin Transformer (arXiv 2103.14030) and Swin V2 (arXiv 2111.09883) for images of one
size, as in microsoft/Swin-Transformer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .chunked_mlp import ChunkedMlp
from .computing import divides
from .embedding import Embedding
from .merging import Merging
from .replacement import LINEAR, Names, Parts
from .shifts import mask_reason
from .structure import Structural, Structure
from .swin_layers import (
    ATTENTION,
    COSINE_ATTENTION,
    SquareBlock,
    attend,
    attend_by_cosines,
    attention_drops,
    attention_parts,
    attention_reads,
    cosine_reads,
)

SIZED: Names = ("input_resolution", "window_size", "shift_size", "attn_mask", "norm1", "norm2", "mlp", "drop_path")


class SizedBlock(SquareBlock):
    """Base class of blocks for maps of one size, with a buffer for the mask of their shift; tokens [B, H*W, C]."""

    parts: ClassVar[Parts] = attention_parts()

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = super().unsupported_reason(module)
        if why is None and getattr(module, "fused_window_process", False):
            why = "its fused_window_process is on: a kernel of its own cuts windows"
        return why or mask_reason(module.attn_mask, module.input_resolution, *cls.windows(module))

    def _map(self: Any, x: Tensor) -> Tensor | None:
        """Tokens as a map [B, H, W, C], if it is one whose attention may run in one op."""
        height, width = self.input_resolution
        if x.shape[1] != height * width or not self.can_run() or attention_drops(self.attn):
            return None
        tokens = x.unflatten(1, (height, width))
        return tokens if divides((self.window_size,) * 2, tokens) else None


class FastMicrosoftSwinBlock(SizedBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    origin = "microsoft/Swin-Transformer models/swin_transformer.py: SwinTransformerBlock"
    structure: ClassVar[Structure] = {
        "": {"forward": ("995c81d74cf60e8d", "52e9d8146a281673", "6018ace02eee3568")},
        "attn": {"forward": ATTENTION},
    }
    reads = (*SIZED, *attention_reads(), "attn.relative_position_index")

    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = self._map(x)
        if tokens is None:
            return self.source.forward(self, x)
        attended = attend(self.attn, self.norm1(tokens), *self.windows(self)).flatten(1, 2)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FastMicrosoftSwinV2Block(SizedBlock):
    """The same with cosine attention; it normalises after attention and feed-forward network."""

    origin = "microsoft/Swin-Transformer models/swin_transformer_v2.py: SwinTransformerBlock"
    structure: ClassVar[Structure] = {"": {"forward": ("4fccee5bb45a86b0",)}, "attn": {"forward": COSINE_ATTENTION}}
    reads = (*SIZED, *cosine_reads())

    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = self._map(x)
        if tokens is None:
            return self.source.forward(self, x)
        attended = attend_by_cosines(self.attn, tokens, *self.windows(self)).flatten(1, 2)
        x = x + self.drop_path(self.norm1(attended))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class FastMicrosoftPatchMerging(Merging, Structural):
    """Tokens [B, H*W, C] -> [B, H/2*W/2, 2*C]."""

    origin = "microsoft/Swin-Transformer models/swin_transformer.py: PatchMerging"
    structure: ClassVar[Structure] = {"": {"forward": ("28440ff9d8c50491",)}}
    reads = ("input_resolution",)
    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        if x.shape[1] != height * width or height % 2 or width % 2 or not self.can_run():
            return self.source.forward(self, x)
        return self._merge(x.unflatten(1, (height, width))).flatten(1, 2)


class FastMicrosoftPatchEmbed(Embedding, Structural):
    """Images [B, Cin, H, W] of one size -> tokens [B, Ho*Wo, C]."""

    origin = "microsoft/Swin-Transformer models/swin_transformer.py: PatchEmbed"
    structure: ClassVar[Structure] = {"": {"forward": ("b4a984d79e08dbf0",)}}
    reads = ("img_size",)
    parts: ClassVar[Parts] = {"proj": (nn.Conv2d,), "norm": (nn.LayerNorm,)}

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        return "it has no norm: nothing to fuse" if module.norm is None else None

    def forward(self: Any, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.img_size) or not self.can_run():
            return self.source.forward(self, x)
        return self._embed(x, (0, 0, 0, 0)).flatten(1, 2)


class FastMicrosoftMlp(ChunkedMlp, Structural):
    """The feed-forward network of Swin Transformers and of what descends from them."""

    origin = "microsoft/Swin-Transformer models/swin_transformer.py: Mlp"
    structure: ClassVar[Structure] = {"": {"forward": ("b6bd3216a2413800",)}}
    reads = ("fc1", "act", "fc2", "drop")
    order = ("fc1", "act", "fc2")
