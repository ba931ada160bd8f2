"""Work that splits itself when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..backends import notify_once
from ..errors import first_line
from ..memory import is_out_of_memory, release

Result = TypeVar("Result")


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
            if size <= 1 or not is_out_of_memory(error):
                raise
            reason = first_line(error)
        else:
            continue
        # outside the handler, so that the failed attempt's tensors are free
        size = -(-size // 2)
        release()
        notify_once(("memory", what, size), f"asvit_fast: {what} runs in batches of {size}, memory ran out ({reason})")
    return results
