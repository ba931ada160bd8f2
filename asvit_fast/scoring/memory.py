"""Work that splits itself when memory runs out, and memory kept from one network to the next."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import TypeVar

import torch

from ..backends import notify_once
from ..errors import first_line

Result = TypeVar("Result")


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt


def disable_malloc_trim() -> bool:
    """Makes the process keep memory that it frees, in one pool for all threads, for programs that score networks alone.

    By default glibc returns large blocks to the system, and every network faults its activations in anew, page by page:
    a tenth of the time of a score. To be called before threads are started. False where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    c_library = ctypes.CDLL(None)
    most = 2**31 - 1  # of mallopt's int
    wishes = ((_TRIM_THRESHOLD, most), (_MMAP_THRESHOLD, 2**30), (_ARENA_MAX, 1))
    return [c_library.mallopt(parameter, value) for parameter, value in wishes] == [1, 1, 1]


def split_on_oom(run: Callable[[slice], Result], total: int, what: str) -> list[Result]:
    """``run`` on slices that cover ``total`` samples: all at once, and in halves of halves whenever memory runs out.

    Raises what ``run`` raises when even a single sample does not fit. Says once that it splits.
    """
    results: list[Result] = []
    start, size = 0, total
    while start < total:
        try:
            results.append(run(slice(start, min(start + size, total))))
            start += size
        except RuntimeError as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if size <= 1 or not out_of_memory:
                raise
            reason = first_line(error)
        else:
            continue
        # outside the handler, so that the failed attempt's tensors are free
        size = -(-size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        notify_once(("memory", what, size), f"asvit_fast: {what} runs in batches of {size}, memory ran out ({reason})")
    return results
