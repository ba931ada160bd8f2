"""Independent pieces of work side by side on a CPU."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

MOST_WORKERS = 8  # each holds the activations of a network of its own


def worker_count(tasks: int, device: torch.device) -> int:
    """The number of ``tasks`` independent tasks ``map_in_threads`` does at a time."""
    return max(1, min(tasks, torch.get_num_threads(), MOST_WORKERS)) if device.type == "cpu" else 1


def map_in_threads(
    work: Callable[[Task], Result], tasks: Sequence[Task], device: torch.device, most_workers: int = MOST_WORKERS
) -> list[Result]:
    """``[work(task) for task in tasks]``, on a CPU in several threads, each of which computes with one thread.

    Sums that several threads share come out in another order, so with a thread for each task results are the same to
    the bit on any number of cores. Whole tasks side by side also use few cores better than one task at a time with
    every product cut in pieces; cores beyond the number of tasks are left idle. torch's work leaves the interpreter
    free to run the others.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not tasks:
        return [work(task) for task in tasks]
    workers = min(worker_count(len(tasks), device), most_workers)
    pool = ThreadPoolExecutor(workers, "score", initializer=torch.set_num_threads, initargs=(1,))
    try:
        contexts = [contextvars.copy_context() for _ in tasks]  # use_backend holds in the threads, too
        return list(pool.map(lambda context, task: context.run(work, task), contexts, tasks))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
