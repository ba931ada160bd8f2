"""Replacements for transformers of image restoration: SwinIR (arXiv 2108.10257), HAT (arXiv 2205.04437) and SwinFIR
(arXiv 2208.11247), as in JingyunLiang/SwinIR, XPixelGroup/HAT and Zdafeng/SwinFIR."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from .computing import divides, project, token_major, with_token_major_gradient
from .microsoft_swin import SIZED, SizedBlock
from .replacement import LINEAR, SOFTMAX, Parts, bypass_reason, call_reason
from .shift_masks import OF_SHIFT, Mask, is_of_shift, mask_tensor
from .structure import Structural, Structure
from .swin_layers import (
    ATTENTION,
    INDEXED_ATTENTION,
    SquareBlock,
    attend,
    attention_drops,
    attention_parts,
    attention_reads,
)
from .syntax import method_digest

HAT = "XPixelGroup/HAT hat/archs/hat_arch.py"
# what hands the parameters of the network on to its blocks: a group's forward, and that of the blocks in it
GROUP, SEQUENCE = "618fa438ecd08f71", "092c18d20472f101"


class FastSwinIRBlock(SizedBlock):
    """Computes the attention of whole maps with the weights of its `attn`, and no mask for maps of other sizes."""

    origin = "JingyunLiang/SwinIR models/network_swinir.py: SwinTransformerBlock"
    structure: ClassVar[Structure] = {
        "": {"forward": ("e586397a8d75002a", "dc8dd5f2fae14a01")},
        "attn": {"forward": ATTENTION},
    }
    reads = (*SIZED, *attention_reads(), "attn.relative_position_index", "calculate_mask")
    bypassed = ("calculate_mask",)

    def forward(self: Any, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        size, (window, shift) = tuple(x_size), self.windows(self)
        runs = x.shape[1] == size[0] * size[1] and self.can_run() and not attention_drops(self.attn)
        if not runs or not divides(window, x.unflatten(1, size)):
            return self.source.forward(self, x, x_size)
        x = token_major(x)
        attended = attend(self.attn, self.norm1(x).unflatten(1, size), window, shift).flatten(1, 2)
        x = x + self.drop_path(attended)
        return with_token_major_gradient(x + self.drop_path(self.mlp(self.norm2(x))))


class FastHybridAttentionBlock(SquareBlock):
    """Computes the attention of whole maps with the weights of its `attn`; tokens [B, H*W, C]."""

    window_size: int
    shift_size: int

    origin = f"{HAT}: HAB"
    structure: ClassVar[Structure] = {"": {"forward": ("e63419b3c1ceb73f",)}, "attn": {"forward": INDEXED_ATTENTION}}
    reads = (
        *("window_size", "shift_size", "norm1", "norm2", "mlp", "drop_path", "conv_block", "conv_scale"),
        *attention_reads(),
    )
    parts: ClassVar[Parts] = attention_parts()

    def forward(self: Any, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Mask) -> Tensor:
        size, (window, shift) = tuple(x_size), self.windows(self)
        runs = x.shape[1] == size[0] * size[1] and self.can_run() and not attention_drops(self.attn)
        runs = runs and divides(window, x.unflatten(1, size))
        if not runs or not is_of_shift(self.source.__name__, attn_mask, size, window, shift):
            return self.source.forward(self, x, x_size, rpi_sa, mask_tensor(attn_mask, size, window, shift, x))
        x = token_major(x)
        tokens = self.norm1(x).unflatten(1, size)  # [B, H, W, C]
        convolved = self.conv_block(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, C]
        attended = attend(self.attn, tokens, window, shift, rpi_sa).flatten(1, 2)
        x = x + self.drop_path(attended) + convolved * self.conv_scale
        return with_token_major_gradient(x + self.drop_path(self.mlp(self.norm2(x))))


class FastOverlappingCrossAttention(Structural):
    """Attention of windows to larger ones around them, of whole maps; tokens [B, H*W, C]. Beyond the map keys and
    values are zeros, which are attended."""

    ops = ("window_attention",)
    origin = f"{HAT}: OCAB"
    structure: ClassVar[Structure] = {"": {"forward": ("cd97062e58fe5621",)}}
    reads = (
        *("window_size", "overlap_win_size", "num_heads", "dim", "scale", "relative_position_bias_table"),
        *("norm1", "norm2", "mlp"),
    )
    parts: ClassVar[Parts] = {"qkv": LINEAR, "unfold": (nn.Unfold,), "softmax": SOFTMAX, "proj": LINEAR}

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        if why is not None:
            return why
        window, keys, unfold = module.window_size, module.overlap_win_size, module.unfold
        expected = (keys, keys), window, (keys - window) // 2, 1
        if (keys - window) % 2 or keys < window:
            return f"its windows of {keys} do not lie around those of {window}"
        if (tuple(unfold.kernel_size), unfold.stride, unfold.padding, unfold.dilation) != expected:
            return f"its unfold is {unfold}"
        return f"its unfold is {unfold}" if module.qkv.out_features != 3 * module.dim else None

    def _attend(self: Any, tokens: Tensor, rpi: Tensor) -> Tensor:
        """A map [B, H, W, C] -> the same."""
        window, around = (self.window_size,) * 2, (self.overlap_win_size,) * 2
        table = self.relative_position_bias_table
        bias = position_bias(table, rpi.reshape(self.window_size**2, self.overlap_win_size**2))
        qkv = project(self.qkv, tokens)  # [B, H, W, 3*C]
        return window_attention(
            qkv, self.num_heads, window, None, bias, self.scale, 0.0, "torchvision", None, None, around
        )

    def forward(self: Any, x: Tensor, x_size: tuple[int, int], rpi: Tensor) -> Tensor:
        size = tuple(x_size)
        runs = x.shape[1] == size[0] * size[1] and self.can_run()
        if not runs or not divides((self.window_size,) * 2, x.unflatten(1, size)):
            return self.source.forward(self, x, x_size, rpi)
        x = token_major(x)
        attended = self._attend(self.norm1(x).unflatten(1, size), rpi).flatten(1, 2)  # [B, H*W, C]
        x = project(self.proj, attended) + x
        return with_token_major_gradient(x + self.mlp(self.norm2(x)))


class FastHybridAttentionTransformer(Structural):
    """Computes no mask where its blocks need none."""

    origin = f"{HAT}: HAT"
    structure: ClassVar[Structure] = {"": {"forward_features": ("0aba97646b5d3f71",)}}
    reads = ("layers", "window_size", "shift_size", "calculate_mask")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        for name, layer in module.layers.named_children():
            group: Any = getattr(layer, "residual_group", None)
            if method_digest(type(layer), "forward") != GROUP or method_digest(type(group), "forward") != SEQUENCE:
                return f"its layers.{name} is not that of {HAT}"
            for part in (layer, group, *group.blocks):
                why = call_reason(part)
                if why is not None:
                    return f"of its layers.{name} the {type(part).__name__} {why}"
        return None

    def _needs_no_mask(self: Any) -> bool:
        return all(
            isinstance(block, FastHybridAttentionBlock)
            and block.window_size == self.window_size
            and block.shift_size in (0, self.shift_size)
            for layer in self.layers
            for block in layer.residual_group.blocks
        )

    def calculate_mask(self: Any, x_size: tuple[int, int]) -> Any:
        """The mask of the shift for maps of that size, or what stands for it."""
        return OF_SHIFT if self.can_run() and self._needs_no_mask() else self.source.calculate_mask(self, x_size)
