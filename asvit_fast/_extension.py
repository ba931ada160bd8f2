"""The compiled extension `asvit_fast._C`, loaded once, and the build report that came with it.

Nothing is compiled here: `pip install --no-build-isolation .` does that. If the extension is missing or does not load,
the reason is kept, word for word, for `show_config()` and for whoever forces a backend that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from ._build import build_report

BUILD = "with `pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout"

_waiting: list[Callable[[], None]] = []  # to be called when the extension is loaded
_limiting = threading.Lock()
_blocks, _limit = 0, 0  # of memory_of_torch that run, and what the limit was before the first


def unsupported_reason(report: dict[str, Any], running_torch: str) -> str | None:
    """Why the extension that `report` describes must not be loaded by this torch; None if it may."""
    if not report:
        return "asvit_fast runs from a source tree that was never installed: pip install --no-build-isolation -e ."
    if not report["extension"]:
        return f"built without compiled kernels: {report['reason']}; build them {BUILD}"
    oldest = report["oldest torch"]
    if _version(running_torch) < _version(oldest):
        return f"the compiled kernels need torch {oldest} or later, this is torch {running_torch}: update torch"
    return None


def _version(text: str) -> tuple[int, ...]:
    """(2, 11) of "2.11.0+cu130"."""
    return tuple(int(part) for part in text.split(".")[:2])


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or the reason why there is none."""
    reason = unsupported_reason(build_report(), torch.__version__)
    if reason is not None:
        return None, reason
    try:
        module = importlib.import_module("asvit_fast._C")
    except ImportError as error:  # a missing library or symbol: the loader's text says which
        return None, f"asvit_fast._C does not load: {error}; rebuild it {BUILD}"
    try:
        while _waiting:
            _waiting.pop()()
    except AttributeError as error:  # an op that is not in it
        return None, f"the compiled kernels are older than the package ({error}): rebuild them {BUILD}"
    return module, None


def when_loaded(action: Callable[[], None]) -> None:
    """Call ``action`` once the extension is loaded: now, if it is."""
    if sys.modules.get("asvit_fast._C") is not None:
        action()
    else:
        _waiting.append(action)


def extension() -> ModuleType | None:
    """The extension, or None; loading it registers its ops in `torch.ops.asvit_fast_C`."""
    return _load()[0]


@contextlib.contextmanager
def memory_of_torch() -> Iterator[None]:
    """Inside of the block our ops keep no memory for later results: torch allocates all, and its profiler sees it."""
    module = extension()
    if module is None:
        yield
        return
    global _blocks, _limit
    with _limiting:
        if _blocks == 0:
            _limit = module.memory_limit()
            module.set_memory_limit(0)
        _blocks += 1
    try:
        yield
    finally:
        with _limiting:
            _blocks -= 1
            if _blocks == 0:
                module.set_memory_limit(_limit)


def free_kept_memory() -> None:
    """Give what our ops keep for later results back to the system."""
    module = sys.modules.get("asvit_fast._C")
    if module is not None:
        module.free_kept_memory()


def reason() -> str | None:
    """Why there is no extension; None if there is one."""
    return _load()[1]


def cuda_reason() -> str | None:
    """Why the extension has no CUDA kernels; None if it has."""
    module, why = _load()
    if module is None:
        return why
    if module.has_cuda:
        return None
    skipped = build_report().get("cuda_reason", "unknown")
    return f"built without CUDA kernels ({skipped}): build them, where nvcc is, {BUILD}"
