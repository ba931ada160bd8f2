"""Errors that say that memory has run out, and memory given back."""

from __future__ import annotations

import gc

import torch

from ._extension import free_kept_memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, on whichever device."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


def release() -> None:
    """Give back what an attempt that failed has left, and what is kept for later tensors."""
    gc.collect()
    free_kept_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
