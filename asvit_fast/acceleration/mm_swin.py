"""Replacements for the shifted windows of OpenMMLab: open-mmlab/mmdetection, mmsegmentation and mmpretrain."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .replacement import Parts, bypass_reason
from .shifts import window_reason
from .structure import Structural, Structure
from .swin_layers import (
    ATTENTION,
    COSINE_ATTENTION,
    attend,
    attend_by_cosines,
    attention_drops,
    attention_parts,
    attention_reads,
    attention_reason,
    cosine_reads,
)

READS = ("window_size", "shift_size", "drop")


class ShiftedWindows(Structural):
    """Base class: an attention that cuts windows of tokens [B, H*W, C] for its `w_msa`, and makes a mask every time."""

    ops = ("window_attention",)
    parts: ClassVar[Parts] = attention_parts("w_msa")
    bypassed = ("window_partition", "window_reverse", "get_attn_mask")
    attend: ClassVar[Any] = staticmethod(attend)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window, shift = (module.window_size,) * 2, (module.shift_size,) * 2
        why = bypass_reason(module, cls.parts) or window_reason(window, shift)
        return why or attention_reason(module.w_msa, window)

    def _shift(self: Any, size: tuple[int, int]) -> int | None:
        """The shift for maps of that size; None if the source takes none of that size."""
        return self.shift_size

    def forward(self: Any, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        size = int(hw_shape[0]), int(hw_shape[1])
        shift = self._shift(size)
        runs = query.shape[1] == size[0] * size[1] and shift is not None
        if not runs or not self.can_run() or attention_drops(self.w_msa):
            return self.source.forward(self, query, hw_shape)
        tokens = query.unflatten(1, size)  # [B, H, W, C]
        x = self.attend(self.w_msa, tokens, (self.window_size,) * 2, (shift,) * 2)
        return self.drop(x.flatten(1, 2))


class FastShiftWindowMSA(ShiftedWindows):
    """That of backbones for detection and segmentation."""

    origin = "open-mmlab/mmdetection mmdet/models/backbones/swin.py: ShiftWindowMSA"
    structure: ClassVar[Structure] = {"": {"forward": ("0844ed98cd926e89",)}, "w_msa": {"forward": ATTENTION}}
    reads = (*READS, *attention_reads("w_msa"), "w_msa.relative_position_index")


class SmallMaps(ShiftedWindows):
    """Base class: on maps as small as a window there is no shift, unless they are padded."""

    def _shift(self: Any, size: tuple[int, int]) -> int | None:
        if self.pad_small_map or min(size) > self.window_size:
            return self.shift_size
        return 0 if min(size) == self.window_size else None


class FastPretrainShiftWindowMSA(SmallMaps):
    """That of classifiers."""

    origin = "open-mmlab/mmpretrain mmpretrain/models/utils/attention.py: ShiftWindowMSA"
    structure: ClassVar[Structure] = {"": {"forward": ("b8b52b81b72fe9ab",)}, "w_msa": {"forward": ATTENTION}}
    reads = (*READS, "pad_small_map", *attention_reads("w_msa"), "w_msa.relative_position_index")


class FastPretrainShiftWindowMSAV2(SmallMaps):
    """The same with cosine attention (Swin V2)."""

    origin = "open-mmlab/mmpretrain mmpretrain/models/utils/attention.py: ShiftWindowMSA of WindowMSAV2"
    structure: ClassVar[Structure] = {"": {"forward": ("b8b52b81b72fe9ab",)}, "w_msa": {"forward": COSINE_ATTENTION}}
    reads = (*READS, "pad_small_map", *cosine_reads("w_msa"))
    attend = staticmethod(attend_by_cosines)
