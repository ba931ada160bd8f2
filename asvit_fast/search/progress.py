"""Progress of a run, on stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.{digits}f}/{total:.{digits}f} {unit} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A bar where stderr is a terminal, one line a step where it is a log, nothing unless ``show``.

    Args:
        name: of the run.
        total, done: size of the run and how much of it earlier processes have done, in ``unit``.
        digits: of these numbers, behind the point.
        out: the run directory, which is named at the start.
        recorded: what it holds already, such as "3 steps".
    """

    def __init__(
        self,
        name: str,
        total: float,
        done: float,
        unit: str,
        show: bool,
        digits: int = 0,
        out: Path | None = None,
        recorded: str = "",
    ) -> None:
        if show and out is not None:
            going_on = f"{out} holds a run of {recorded}: continuing from there."
            begin = f"Writing to {out}; stop at any time, the same command continues."
            print(going_on if recorded else begin, file=sys.stderr, flush=True)
        self.name, self.total, self.begun_at, self.unit, self.digits = name, total, done, unit, digits
        terminal = sys.stderr.isatty()
        self._writes_lines = show and not terminal
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=unit,
            bar_format=_BAR.replace("{digits}", str(digits)),
            disable=not (show and terminal),
        )

    def step(self, done: float, text: str) -> None:
        """A step has ended, and so much of the run with it."""
        if self._writes_lines:
            position = f"{done:.{self.digits}f}/{self.total:.{self.digits}f} {self.unit}"
            pace = (time.perf_counter() - self._started) / max(done - self.begun_at, 1e-9)
            left = tqdm.format_interval(round(pace * max(self.total - done, 0)))
            print(f"{self.name}: {position}, {text}, {left} left", file=sys.stderr, flush=True)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def within_step(self, text: str) -> None:
        """Show the current work, on the bar alone."""
        self._bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
