"""Sharing the scoring of candidates over the processes that torchrun started.

Rank 0 runs the algorithm and alone touches files; the other ranks compute their share of every list of tasks. Tasks are
pure functions of their arguments, so the result is that of a single process with as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import InputError
from ..processes import broadcast, gather, init_process_group, portable, run_on_rank0

Task = TypeVar("Task")
Result = TypeVar("Result")
Values = tuple[float, ...]
Share = Callable[[Sequence[Task]], list[Values]]


def run_shared(lead: Callable[[Share[Task]], Result], work: Share[Task], device: torch.device | None = None) -> Result:
    """Run ``lead(share)`` on rank 0, where ``share(tasks)`` is ``work(tasks)`` spread over all ranks.

    Every rank gets the result. An error of any rank ends all ranks with its message.
    """
    if init_process_group(device or torch.device("cpu")) == 1:
        return lead(work)
    if dist.get_rank() != 0:
        return _follow(work)

    def share(tasks: Sequence[Task]) -> list[Values]:
        broadcast(("tasks", list(tasks)))
        values, errors = _gather(work, tasks)
        own = next((error for rank, error in errors if rank == 0), None)
        if own is not None:
            raise own
        for rank, error in errors:
            kind = InputError if isinstance(error, InputError) else RuntimeError
            raise kind(f"rank {rank}: {type(error).__name__}: {error}" if kind is RuntimeError else str(error))
        return values

    return run_on_rank0(lambda: lead(share))


def _follow(work: Share[Any]) -> Any:
    while True:
        kind, content = broadcast(None)
        if kind == "result":
            return content
        if kind == "error":
            raise content
        _gather(work, content)


def _gather(work: Share[Task], tasks: Sequence[Task]) -> tuple[list[Values], list[tuple[int, Exception]]]:
    """Do every ``world_size``-th task here; return the values of all tasks in order, and who failed with what."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own: list[Values] | Exception
    failure: Exception | None = None
    try:
        own = work(tasks[rank::size])  # Python floats: float64 on the way, too
    except Exception as error:
        failure, own = error, portable(error)
    gathered = gather(own)
    errors = [(index, part) for index, part in enumerate(gathered) if isinstance(part, Exception)]
    if failure is not None:  # the original, with its traceback
        errors = [(index, failure if index == rank else error) for index, error in errors]
    if errors:
        return [], errors
    return [gathered[index % size][index // size] for index in range(len(tasks))], []
