"""Whether the windows, shift and mask that a block has are those that the fused op computes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.windows import window_mask, window_padding

# of masks that were compared: their version, what they were compared with, and whether they were equal
_compared: Any = WeakTensorKeyDictionary()


def window_reason(window: Sequence[int], shift: Sequence[int]) -> str | None:
    """Why the op does not take windows and a shift, as numbers of tokens along each of two or three axes."""
    if not all(isinstance(lengths, (tuple, list)) for lengths in (window, shift)) or len(window) != len(shift):
        return f"its windows are {window}, its shift {shift}"
    if len(window) not in (2, 3):
        return f"its windows are {window}, its shift {shift}"
    if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        return f"its shift {tuple(shift)} is not within its windows {tuple(window)}"
    return None


def mask_reason(mask: Tensor | None, size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> str | None:
    """Why a mask [windows, tokens, tokens] is not that of a shift of a map of `size`.

    Its numbers are compared once, and again after an operation in place.
    """
    if mask is None:
        return "it has a shift and no attn_mask" if any(shift) else None
    if any(shift) and (_is_hidden(mask) or _is_mask_of(mask, tuple(size), tuple(window), tuple(shift))):
        return None
    return "its attn_mask is not that of its shift"


def _is_hidden(mask: Tensor) -> bool:
    """Whether the numbers of a mask cannot be looked at here without a trace of that."""
    if mask.is_meta or isinstance(mask, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return True
    return torch.jit.is_tracing() or _get_current_dispatch_mode() is not None


def _is_mask_of(mask: Tensor, size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> bool:
    state = (None if mask.is_inference() else mask._version, size, window, shift)
    known = _compared.get(mask)
    if known is None or known[0] != state:
        padded = [n + window_padding(n, w) for n, w in zip(size, window, strict=True)]
        with torch._C.DisableTorchFunction(), torch.no_grad():
            expected = window_mask(padded, list(window), list(shift), mask.dtype, mask.device, "timm")
            known = (state, expected is not None and torch.equal(mask, expected))
        _compared[mask] = known
    return known[1]
