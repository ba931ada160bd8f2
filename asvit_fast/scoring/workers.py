"""Independent pieces of work side by side on a CPU."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

MOST_WORKERS = 4  # each holds the activations of a network of its own


def worker_count(tasks: int, device: torch.device) -> int:
    """How many of ``tasks`` independent tasks ``side_by_side`` does at a time."""
    return max(1, min(tasks, torch.get_num_threads(), MOST_WORKERS)) if device.type == "cpu" else 1


def side_by_side(work: Callable[[Task], Result], tasks: Sequence[Task], device: torch.device) -> list[Result]:
    """``[work(task) for task in tasks]``, on a CPU in several threads that share torch's threads among them.

    Whole networks side by side use the cores better than one network at a time with every product cut in pieces, and do
    not stall when other processes use the machine too. torch's work leaves the interpreter free to run the others.
    """
    threads = torch.get_num_threads()
    workers = worker_count(len(tasks), device)
    if workers == 1:
        return [work(task) for task in tasks]
    pool = ThreadPoolExecutor(workers, "score", initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        contexts = [contextvars.copy_context() for _ in tasks]  # use_backend holds in the threads, too
        return list(pool.map(lambda context, task: context.run(work, task), contexts, tasks))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
