"""Replacements for the encoder of MONAI's SwinUNETR (arXiv 2201.01266), a Swin Transformer of images and volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from monai.networks.blocks.mlp import MLPBlock
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    WindowAttention,
    get_window_size,
)
from torch import Tensor, nn

from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from .chunked_mlp import ChunkedMlp
from .computing import (
    drop_probability,
    drops,
    padding_token,
    project,
    token_major,
    window_dropout,
    with_token_major_gradient,
)
from .merging import Merging
from .replacement import DROP, LINEAR, SOFTMAX, Names, Parts, Replacement, bypass_reason, call_reason
from .shift_masks import OF_SHIFT, Mask, is_of_shift, mask_tensor
from .shifts import window_reason

LAYOUT = "torchvision"  # maps are padded, then rolled


class FastSwinUNETRBlock(Replacement, SwinTransformerBlock):
    """Computes the attention of whole maps [B, *size, C] with the weights of its `attn`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        *("window_size", "shift_size", "norm1", "attn.num_heads", "attn.scale", "attn.window_size"),
        *("attn.relative_position_bias_table", "attn.relative_position_index"),
    )
    parts: ClassVar[Parts] = {
        "attn": (WindowAttention,),
        "attn.qkv": LINEAR,
        "attn.softmax": SOFTMAX,
        "attn.attn_drop": DROP,
        "attn.proj": LINEAR,
        "attn.proj_drop": DROP,
    }

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window = module.window_size
        why = bypass_reason(module, cls.parts) or window_reason(window, module.shift_size)
        if why is None and tuple(window) != tuple(module.attn.window_size):
            why = f"its windows are {window}, those of its attention {module.attn.window_size}"
        return why

    def _attend(self: Any, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
        """A map [B, *size, C] -> the same."""
        attn, window, shift = self.attn, tuple(window), tuple(shift)
        tokens = torch.Size(window).numel()
        index = attn.relative_position_index[:tokens, :tokens]  # of clipped windows: the source's choice
        bias = position_bias(attn.relative_position_bias_table, index)
        padding = padding_token(attn.qkv.bias, x, window)
        qkv = project(attn.qkv, x)  # [B, *size, 3*C]
        x = window_attention(qkv, attn.num_heads, window, shift, bias, attn.scale, 0.0, LAYOUT, padding)
        return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, shift, LAYOUT)

    def forward_part1(self: Any, x: Tensor, mask_matrix: Mask) -> Tensor:
        size = tuple(x.shape[1:-1])
        window, shift = get_window_size(size, self.window_size, self.shift_size)
        runs = self.can_run() and not drops(self.attn.attn_drop.p, self.attn.attn_drop.training)
        if runs and is_of_shift(self.source.__name__, mask_matrix, size, window, shift):
            return self._attend(self.norm1(x), window, shift)
        return super().forward_part1(x, mask_tensor(mask_matrix, size, window, shift, x))


class FastSwinUNETRStage(Replacement, BasicLayer):
    """Computes no mask where its blocks need none: at 128^3 voxels that of the first stage is half a gigabyte."""

    reads: ClassVar[Names] = ("blocks", "downsample")

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        if all(
            issubclass(getattr(type(block), "source", type(block)), SwinTransformerBlock) for block in module.blocks
        ):
            return None
        return "its blocks have no window attention"

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        reasons = ((name, call_reason(block)) for name, block in module.blocks.named_children())
        return next((f"its blocks.{name} {why}" for name, why in reasons if why is not None), None)

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, C, *size] -> [B, C', *size']."""
        if x.dim() not in (4, 5) or not self.can_run():
            return super().forward(x)
        if not all(isinstance(block, FastSwinUNETRBlock) for block in self.blocks):
            return super().forward(x)
        x = token_major(x.movedim(1, -1))
        for block in self.blocks:
            x = block(x, OF_SHIFT)
        if self.downsample is not None:
            x = self.downsample(x)
        return with_token_major_gradient(x).movedim(-1, 1)


class ImageMerging(Merging):
    """Merging of the four neighbours in images."""

    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm,), "reduction": LINEAR}
    reads: ClassVar[Names] = ("dim",)

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        reduction = module._modules.get("reduction")
        return (
            "of voxels: below 1 percent of the network's time"
            if getattr(reduction, "in_features", 0) == 8 * module.dim
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2*C]."""
        return self._merge(x) if x.dim() == 4 and self.can_run() else super().forward(x)  # type: ignore[misc]


class FastSwinUNETRPatchMergingV2(ImageMerging, PatchMergingV2):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2*C]."""


class FastSwinUNETRPatchMerging(ImageMerging, PatchMerging):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2*C]."""


class FastMonaiMLP(ChunkedMlp, MLPBlock):
    """The feed-forward network of MONAI's transformers."""

    order = ("linear1", "fn", "linear2")
