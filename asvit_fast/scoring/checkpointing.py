"""Activation checkpoints while per-sample gradients are recorded: what they would forget is kept.

A checkpointed function runs a second time during the backward pass, on its own, where a recording of the first run
would be of no use.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

_lock = threading.Lock()
_inside = threading.local()  # .depth: how many times this thread is inside of ``checkpoints_run_directly``
_users = 0  # threads inside
_Reentrant = torch_checkpoint.CheckpointFunction
_NAME = _Reentrant.__name__


class _DirectHere(_Reentrant):
    """torch's reentrant checkpoint, which runs its function directly in threads that want so."""

    @classmethod
    def apply(cls, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if getattr(_inside, "depth", 0):
            return function(*args)
        return _Reentrant.apply(function, preserve_rng_state, *args)


@contextlib.contextmanager
def checkpoints_run_directly() -> Iterator[None]:
    """Reentrant checkpoints of this thread are calls of their function; other threads see no difference."""
    global _users
    with _lock:
        _users += 1
        setattr(torch_checkpoint, _NAME, _DirectHere)
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1
        with _lock:
            _users -= 1
            if not _users:
                setattr(torch_checkpoint, _NAME, _Reentrant)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version  # detached: a function's own output would keep itself alive


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor needed for gradient computation has been modified by an inplace operation")
    return tensor


def saved_as_usual() -> contextlib.AbstractContextManager[Any]:
    """Keep what a function saves for its backward pass, also within a checkpoint that is not reentrant."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
