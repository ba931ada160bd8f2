"""Helpers of long runs on the command line: an early end, the announcement of what is on record."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..errors import EXIT_TERMINATED
from ..files import read_jsonl
from ..run_directory import TRACE
from .common import is_main_process, print_on_main


@contextlib.contextmanager
def long_run() -> Iterator[None]:
    """SIGTERM (a preempted job) ends the run as Ctrl-C does, files closed, with exit code 143.

    Under torchrun this holds for rank 0, which alone has files; the others end at once.
    """
    in_charge = is_main_process() and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if in_charge and before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)


def announce_folder(directory: str, quiet: bool) -> None:
    """Say whether the run directory is new."""
    done = len(read_jsonl(Path(directory) / TRACE))
    going_on = f"{directory} holds a run of {done} steps: continuing from there."
    print_on_main(going_on if done else f"Writing to {directory}; stop at any time, the same command continues.", quiet)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the end
    with contextlib.suppress(OSError):
        print("\nasvit-fast: terminated; the same command continues where it stopped", file=sys.stderr)
    raise SystemExit(EXIT_TERMINATED)
