"""Memory of the CPU, as a program that runs one network after the other wants it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

from .errors import InputError

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt
_SHARE = "ASVIT_FAST_MEMORY_SHARE"  # N: our ops keep an N-th of the machine's memory at most (16); 0: nothing


def tune_allocator() -> bool:
    """Keep memory that is freed, for good and for the whole process: for programs that run networks and nothing else.

    By default glibc returns large blocks to the system, and every network faults its activations in anew, page by page:
    a tenth of the time of a score, half of the time of the first feed-forward networks of Swin-T. After this call glibc
    keeps them, in one pool for all threads, and our ops keep up to a fourth of the machine's memory for their results
    (without it a sixteenth; the environment variable ASVIT_FAST_MEMORY_SHARE=8 makes it an eighth, and 0 nothing: all
    memory is torch's then). The memory of the process stays at its peak. The commands of this package call it, but for
    ``asvit-fast bench``; in a script of your own call it first, before threads are started.

    Returns:
        True if glibc accepted the settings; False where there is no glibc.

    Raises:
        InputError: ASVIT_FAST_MEMORY_SHARE is no whole number.

    Examples:
        >>> import asvit_fast as af
        >>> tuned = af.tune_allocator()  # the first line of a script
    """
    share = os.environ.setdefault(_SHARE, "4")
    if not share.isdecimal():
        raise InputError(f"{_SHARE} must be a whole number, 0 for none, got {share!r}")
    extension = sys.modules.get("asvit_fast._C")  # asks itself when it needs memory first
    if extension is not None:
        extension.set_memory_limit(extension.memory_share())
    if platform.libc_ver()[0] != "glibc":
        return False
    c_library = ctypes.CDLL(None)
    most = 2**31 - 1  # of mallopt's int
    values = ((_TRIM_THRESHOLD, most), (_MMAP_THRESHOLD, 2**30), (_ARENA_MAX, 1))
    return [c_library.mallopt(parameter, value) for parameter, value in values] == [1, 1, 1]
