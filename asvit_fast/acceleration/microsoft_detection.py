"""Replacements for Microsoft's Swin Transformer as a backbone, of maps of any size, as in
SwinTransformer/Swin-Transformer-Object-Detection and -Semantic-Segmentation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .merging import Merging
from .replacement import LINEAR, Parts, call_reason
from .shift_masks import OF_SHIFT, Mask, is_of_shift, mask_tensor
from .structure import Structural, Structure
from .swin_layers import ATTENTION, SquareBlock, attend, attention_drops, attention_parts, attention_reads

FILE = "SwinTransformer/Swin-Transformer-Object-Detection mmdet/models/backbones/swin_transformer.py"


def blocks_reason(blocks: nn.Module) -> str | None:
    """Why the blocks of a stage must get what its source hands them."""
    reasons = ((name, call_reason(block)) for name, block in blocks.named_children())
    return next((f"its blocks.{name} {why}" for name, why in reasons if why is not None), None)


class FastBackboneBlock(SquareBlock):
    """Computes the attention of whole maps with the weights of its `attn`; tokens [B, H*W, C]."""

    window_size: int
    shift_size: int

    origin = f"{FILE}: SwinTransformerBlock"
    structure: ClassVar[Structure] = {"": {"forward": ("4a2b878f50ecf1cf",)}, "attn": {"forward": ATTENTION}}
    reads = (
        *("H", "W", "window_size", "shift_size", "norm1", "norm2", "mlp", "drop_path"),
        *(*attention_reads(), "attn.relative_position_index"),
    )
    parts: ClassVar[Parts] = attention_parts()

    def forward(self: Any, x: Tensor, mask_matrix: Mask) -> Tensor:
        size, (window, shift) = (self.H, self.W), self.windows(self)
        runs = None not in size and x.shape[1] == self.H * self.W and self.can_run() and not attention_drops(self.attn)
        if not runs or not is_of_shift(self.source.__name__, mask_matrix, size, window, shift):
            return self.source.forward(self, x, mask_tensor(mask_matrix, size, window, shift, x))
        attended = attend(self.attn, self.norm1(x).unflatten(1, size), window, shift).flatten(1, 2)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FastBackboneStage(Structural):
    """Computes no mask where its blocks need none."""

    origin = f"{FILE}: BasicLayer"
    structure: ClassVar[Structure] = {"": {"forward": ("65d60a65c15ff5ed",)}}
    reads = ("blocks", "downsample", "use_checkpoint", "window_size", "shift_size")

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        return "it checkpoints its blocks, with its mask" if module.use_checkpoint else None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return blocks_reason(module.blocks)

    def forward(self: Any, x: Tensor, H: int, W: int) -> tuple[Any, ...]:
        alike = all(
            isinstance(block, FastBackboneBlock)
            and block.window_size == self.window_size
            and block.shift_size in (0, self.shift_size)
            for block in self.blocks
        )
        if self.use_checkpoint or not alike or not self.can_run():
            return self.source.forward(self, x, H, W)
        for block in self.blocks:
            block.H, block.W = H, W
            x = block(x, OF_SHIFT)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2


class FastBackbonePatchMerging(Merging, Structural):
    """Tokens [B, H*W, C] -> [B, ceil(H/2)*ceil(W/2), 2*C]."""

    origin = f"{FILE}: PatchMerging"
    structure: ClassVar[Structure] = {"": {"forward": ("ad52b1b0c6d821fb",)}}
    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}

    def forward(self: Any, x: Tensor, H: int, W: int) -> Tensor:
        if x.shape[1] != H * W or not self.can_run():
            return self.source.forward(self, x, H, W)
        return self._merge(x.unflatten(1, (H, W))).flatten(1, 2)
