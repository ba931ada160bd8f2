"""Masks that a stage or a network makes once and hands to its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..ops.windows import window_mask, window_padding
from .shifts import mask_reason


class _OfShift:
    """In place of the mask of a shift, where nobody needs its numbers."""

    def to(self, *args: Any, **kwargs: Any) -> _OfShift:
        return self


OF_SHIFT = _OfShift()
Mask = Tensor | _OfShift | None


@torch.compiler.assume_constant_result  # a warning would break the graph: this one is given while tracing
def _warn(name: str, why: str) -> None:
    backends.notify_once((name, why), f"asvit_fast runs {name} as its source does: {why}")


def is_of_shift(name: str, mask: Mask, size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Whether a mask that is handed to a block is that of its shift; if not, warns once for each class `name`.

    Its numbers are compared with those of the shift, once for each tensor. torch.compile cannot see them.
    """
    if not any(shift) or isinstance(mask, _OfShift):
        return True
    if torch.compiler.is_compiling():
        why: str | None = "torch.compile cannot see the numbers of the mask that it is called with"
    elif mask is not None and mask.requires_grad:
        why = "the mask that it is called with wants a gradient"
    else:
        why = mask_reason(mask, size, window, shift)
    if why is not None:
        _warn(name, why.replace("its attn_mask", "the mask that it is called with"))
    return why is None


def mask_tensor(
    mask: Mask, size: Sequence[int], window: Sequence[int], shift: Sequence[int], x: Tensor
) -> Tensor | None:
    """The mask as the source of a block has it, on the device of x."""
    if not isinstance(mask, _OfShift):
        return mask
    padded = [n + window_padding(n, w) for n, w in zip(size, window, strict=True)]
    return window_mask(padded, list(window), list(shift), torch.get_default_dtype(), x.device, "timm")
