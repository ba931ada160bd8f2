"""Replacements for block and patch merging of timm's Swin Transformer (arXiv 2103.14030): windows are cut, rolled and
padded by the kernel."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import LayerNorm
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from ..ops.windows import window_padding
from .computing import attention_drops, drop_probability, padding_token, project, window_dropout
from .merging import Merging
from .norm_linear import linear_of_norm
from .replacement import DROP, LINEAR, SOFTMAX, Names, Parts, Replacement, bypass_reason
from .residual import does, feed_forward_onto, joins, project_onto
from .shifts import mask_reason, window_reason

FORWARD = ("5464e5dc9c830e3d",)  # what the forward of a block does, where its sums may be made in products


class ShiftedWindows(Replacement):
    """Base class for timm's three Swin Transformers: a block that cuts windows for `attn` and masks by
    `attn_mask`."""

    ops = ("window_attention",)
    reads: ClassVar[Names] = (
        "window_size",
        "shift_size",
        "window_area",
        "attn_mask",
        "attn.window_size",
        "attn.num_heads",
    )
    bypassed = ("get_attn_mask",)
    map_size: ClassVar[str] = "input_resolution"  # attribute: (rows, columns) of the maps that a mask is made for

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window, shift = module.window_size, module.shift_size
        why = bypass_reason(module, cls.bypassed_parts()) or window_reason(window, shift)
        if why is not None:
            return why
        if tuple(window) != tuple(module.attn.window_size):
            return f"its windows are {window}, those of its attention {module.attn.window_size}"
        if module.window_area != window[0] * window[1]:
            return f"its windows {window} do not have {module.window_area} tokens"
        if getattr(module, "dynamic_mask", False):
            return None
        return mask_reason(module.attn_mask, getattr(module, cls.map_size), window, shift)

    def _masks_fit(self: Any, x: Tensor) -> bool:
        """Whether the mask that is kept is for a map like x [B, H, W, C]: the source would use it all the same."""
        if getattr(self, "dynamic_mask", False):
            return True
        if self.attn_mask is None:
            return not any(self.shift_size)
        sizes = zip(x.shape[1:3], getattr(self, self.map_size), self.window_size, strict=True)
        return all(n + window_padding(n, w) == m + window_padding(m, w) for n, m, w in sizes)

    def can_run_on(self: Any, x: Tensor) -> bool:
        """Whether attention of the map x [B, H, W, C] may run in one op."""
        return self.can_run() and not attention_drops(self.attn) and self._masks_fit(x)


class FastSwinTransformerBlock(ShiftedWindows, SwinTransformerBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    reads: ClassVar[Names] = (
        *ShiftedWindows.reads,
        "input_resolution",
        *("norm1", "norm2", "mlp", "drop_path1", "drop_path2"),
        "attn.fused_attn",
        "attn.scale",
        *("attn._get_rel_pos_bias", "attn.relative_position_bias_table", "attn.relative_position_index"),
    )
    bypassed_of_parts: ClassVar[Parts] = {"_get_rel_pos_bias": (WindowAttention,)}
    parts: ClassVar[Parts] = {
        "attn": (WindowAttention,),
        "attn.qkv": LINEAR,
        "attn.softmax": SOFTMAX,
        "attn.attn_drop": DROP,
        "attn.proj": LINEAR,
        "attn.proj_drop": DROP,
    }

    def forward(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        plain = joins(x, (self.drop_path1, self.drop_path2)) and drop_probability(attn.proj_drop) == 0.0
        if not plain or not does(self.source, FORWARD) or not self.can_run_on(x):
            return super().forward(x)
        y = self._attend(linear_of_norm(self.norm1, x, attn.qkv))
        x = project_onto(attn.proj, y, x)
        return feed_forward_onto(self.norm2, self.mlp, x.flatten(1, 2)).view(x.shape)

    def _attn(self, x: Tensor) -> Tensor:
        if not self.can_run_on(x):
            return super()._attn(x)
        attn: Any = self.attn
        y = project(attn.proj, self._attend(project(attn.qkv, x)))
        return window_dropout(y, drop_probability(attn.proj_drop), self.window_size, self.shift_size)

    def _attend(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3*heads*d] -> [B, H, W, heads*d]."""
        attn: Any = self.attn
        window, shift = self.window_size, self.shift_size
        padding = padding_token(attn.qkv.bias, qkv, window)
        index = attn.relative_position_index.reshape(self.window_area, -1)  # [N, N]
        bias = position_bias(attn.relative_position_bias_table, index)  # [heads, N, N]
        scale = None if attn.fused_attn else attn.scale
        return window_attention(qkv, attn.num_heads, window, shift, bias, scale, 0.0, "timm", padding)


class FastPatchMerging(Merging, PatchMerging):
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), out_dim]."""

    parts: ClassVar[Parts] = {"norm": (nn.LayerNorm, LayerNorm), "reduction": LINEAR}

    def forward(self, x: Tensor) -> Tensor:
        return self._merge(x) if self.can_run() else super().forward(x)
