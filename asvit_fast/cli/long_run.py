"""How long runs on the command line end early."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from ..errors import EXIT_TERMINATED
from .common import is_main_process


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


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the end
    with contextlib.suppress(OSError):
        print("\nasvit-fast: terminated; the same command continues where it stopped", file=sys.stderr)
    raise SystemExit(EXIT_TERMINATED)
