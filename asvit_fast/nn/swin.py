"""Replacement for the block of timm's Swin Transformer (arXiv 2103.14030): windows are cut, rolled and padded by the
kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..ops.window_attention import window_attention
from ..ops.windows import window_padding
from .replacement import (
    DROP,
    LINEAR,
    SOFTMAX,
    Parts,
    Replacement,
    bypass_reason,
    drop_probability,
    drops,
    padding_token,
    project,
    window_dropout,
)


class ShiftedWindows(Replacement):
    """What timm's three Swin Transformers have in common: a block that cuts windows for `attn` and masks by
    `attn_mask`."""

    ops = ("window_attention",)
    bypassed = ("get_attn_mask",)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.bypassed_parts())
        if why is None and tuple(module.window_size) != tuple(module.attn.window_size):
            why = f"its windows are {module.window_size}, those of its attention {module.attn.window_size}"
        return why

    @classmethod
    def altered_reason(cls, module: Any) -> str | None:
        mask = module._buffers.get("attn_mask")
        if mask is None or getattr(module, "dynamic_mask", False) or mask.is_meta or isinstance(mask, FakeTensor):
            return None
        source: Any = cls.source
        expected = source.get_attn_mask(module, device=mask.device, dtype=mask.dtype)
        same = expected is not None and torch.equal(mask, expected)
        return None if same else "its attn_mask is not that of its shift"

    def _masks_fit(self: Any, x: Tensor) -> bool:
        """Whether the mask that is kept is for a map like x [B, H, W, C]: the source would use it all the same."""
        if getattr(self, "dynamic_mask", False):
            return True
        if self.attn_mask is None:
            return not any(self.shift_size)
        rows, columns = ((n + window_padding(n, w)) // w for n, w in zip(x.shape[1:3], self.window_size, strict=True))
        return self.attn_mask.shape[0] == rows * columns

    def _fuses(self: Any, x: Tensor) -> bool:
        """Whether attention of the map x [B, H, W, C] may run in one op."""
        attn_drop = self.attn.attn_drop if self.can_run() else None
        return attn_drop is not None and not drops(attn_drop.p, attn_drop.training) and self._masks_fit(x)


class FastSwinTransformerBlock(ShiftedWindows, SwinTransformerBlock):
    """Computes the attention of whole maps with the weights of its `attn`."""

    source = SwinTransformerBlock
    parts: ClassVar[Parts] = {
        "attn": (WindowAttention,),
        "attn.qkv": LINEAR,
        "attn.softmax": SOFTMAX,
        "attn.attn_drop": DROP,
        "attn.proj": LINEAR,
        "attn.proj_drop": DROP,
    }

    def _attn(self, x: Tensor) -> Tensor:
        if not self._fuses(x):
            return super()._attn(x)
        attn: Any = self.attn
        window, shift = self.window_size, self.shift_size
        qkv = project(attn.qkv, x)  # [B, H, W, 3*heads*d]
        padding = padding_token(attn.qkv.bias, x, window)
        bias = attn._get_rel_pos_bias()[0]  # [heads, N, N]
        scale = None if attn.fused_attn else attn.scale
        x = window_attention(
            qkv, attn.num_heads, window, shift, bias, scale, 0.0, "timm", padding
        )  # [B, H, W, heads*d]
        return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, shift)
