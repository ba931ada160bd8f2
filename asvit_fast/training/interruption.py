"""Reasons to end a training between two updates, the same on all ranks: SIGTERM, or an image that cannot be read."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from .. import processes
from ..errors import EXIT_TERMINATED, InputError

Item = TypeVar("Item")


class Terminated(SystemExit):
    """SIGTERM has ended a training, after a checkpoint."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


class Unreadable(InputError):
    """An image that cannot be read, on any rank; every rank raises it before the same update."""


class _Interrupt(BaseException):
    """Raised by the signal while images are awaited; no handler of exceptions in a data set may take it for its own."""


class Interruption:
    """Makes all ranks stop together when one of them is asked to, or cannot read its images.

    SIGTERM is heard inside ``listening``. It breaks off the reading of images; everywhere else it waits for
    ``raise_if_stopped``.
    """

    def __init__(self) -> None:
        self._terminated = self._reading = False
        self._error: InputError | None = None
        self._group = processes.cpu_group()  # ranks must not wait for their GPUs to learn of each other

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM, in the main thread and unless the program handles it itself; the handler is put back."""
        if threading.current_thread() is not threading.main_thread() or (
            signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        ):
            yield
            return
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def in_step(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches. Every rank has read its batch before any of them gets one.

        Raises:
            Terminated, Unreadable: on every rank, in place of the same batch.
        """
        own = self.until_stopped(batches)
        while True:
            batch = next(own, None)
            self.raise_if_stopped()
            if batch is None:
                return
            yield batch

    def until_stopped(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches, or the first of them, where this rank is stopped: ``raise_if_stopped`` tells."""
        remaining = iter(batches)
        while (batch := self._read(remaining)) is not None:
            yield batch

    def raise_if_stopped(self) -> None:
        """Stop where any rank was stopped; every rank must call it at the same point.

        Raises:
            Terminated, Unreadable: on every rank, if one was stopped.
        """
        stopped = torch.tensor([self._error is not None, self._terminated], dtype=torch.uint8)  # [2]
        if self._group is not None:
            dist.all_reduce(stopped, dist.ReduceOp.MAX, group=self._group)
        if stopped[0]:
            texts = processes.gather("" if self._error is None else str(self._error))
            raise Unreadable(next(filter(None, texts)))
        if stopped[1]:
            raise Terminated

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
        if self._reading:
            self._reading = False  # once
            raise _Interrupt

    def _read(self, batches: Iterator[Item]) -> Item | None:
        try:
            try:
                self._reading = True
                return None if self._terminated else next(batches, None)
            except InputError as error:
                self._error = error
                return None
            finally:
                self._reading = False
        except _Interrupt:
            return None
