"""glibc's memory allocator, as a program that runs one network after the other wants it."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt


def disable_malloc_trim() -> bool:
    """Make the process keep memory that it frees, in one pool for all threads, for good: for whole programs only.

    By default glibc returns large blocks to the system, and every network faults its activations in anew, page by page:
    a tenth of the time of a score. To be called before threads are started. False where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    c_library = ctypes.CDLL(None)
    most = 2**31 - 1  # of mallopt's int
    values = ((_TRIM_THRESHOLD, most), (_MMAP_THRESHOLD, 2**30), (_ARENA_MAX, 1))
    return [c_library.mallopt(parameter, value) for parameter, value in values] == [1, 1, 1]
