"""The processes that torchrun started: joining them, and saying the same thing to all."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import InputError

Result = TypeVar("Result")

_alone = False  # inside ``alone``

_TIMEOUT = timedelta(days=7)  # a rank may compute for long; torchrun ends everybody when one process dies


def init_process_group(device: torch.device) -> int:
    """Number of processes; joins those of torchrun unless the caller has done so already."""
    if _alone or not dist.is_available():
        return 1
    if not dist.is_initialized():
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 1
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT, **_meeting_place())
        atexit.register(
            lambda: dist.destroy_process_group() if dist.is_initialized() else None
        )  # not at the end of a run: joining a second time is not reliable
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nccl sends objects through the current device
    return dist.get_world_size()


def _meeting_place() -> dict[str, Any]:
    """Say where processes find each other. The store of torchrun's agent outlives a restart, with the addresses of the
    processes that died in it, so that new ones wait for those (torch 2.15): each attempt gets keys of its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size, attempt = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    own = dist.PrefixStore(f"asvit_fast/attempt_{attempt}_of_{size}", store)
    return {"store": own, "rank": int(rank), "world_size": int(size)}


def is_distributed() -> bool:
    """Return whether there is anybody else to talk to."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Compute as if this process were the only one, while the others do something else."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def cpu_group() -> Any:
    """All ranks, talking through the CPU whatever their devices do; None where there is but one."""
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if is_distributed() else None


def broadcast(message: Any) -> Any:
    """The message of rank 0, on every rank."""
    if not is_distributed():
        return message
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def run_on_rank0(function: Callable[[], Result]) -> Result:
    """Run ``function`` on rank 0 and return its result on every rank; its error ends all of them."""
    if rank() != 0:
        kind, content = broadcast(None)
        if kind == "error":
            raise content
        return content
    try:
        result = function()
    except Exception as error:
        broadcast(("error", portable(error)))
        raise
    broadcast(("result", result))
    return result


def portable(error: Exception) -> Exception:
    """Put the message into a class that every process can unpickle."""
    if isinstance(error, InputError):
        return InputError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
