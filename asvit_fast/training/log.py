"""Reports of a training while it runs: a progress bar, callbacks, a table of the epochs."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import write_atomic
from ..tokens import tokens_text
from .callbacks import Callback, TrainingInfo
from .schedule import RetokenizationSchedule

SUMMARY = "summary.csv"
WINDOW = 50  # updates that the speed is measured over
QUIET_SECONDS = 30.0  # between lines where no terminal shows a bar
_SMOOTHING = 0.9  # of the loss in the bar
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Pace:
    """Speed of the updates, and time that the rest of a training takes, whose phases cost differently.

    Args:
        reductions: token reduction of every epoch.
        updates_per_epoch: updates of one epoch.
        relative_cost: cost of an update by reduction, in any unit: for reductions that have not been measured yet.
    """

    def __init__(self, reductions: Sequence[int], updates_per_epoch: int, relative_cost: Mapping[int, float]) -> None:
        self.reductions, self.updates_per_epoch, self.relative_cost = reductions, updates_per_epoch, relative_cost
        self.measured: dict[int, float] = {}  # seconds per update by reduction
        self.reduction: int | None = None
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (seconds, of which waiting for data)
        self._pauses: list[float] = []  # seconds between the last update of an epoch and what followed it
        self._last = time.perf_counter()

    def update(self, reduction: int, data_seconds: float) -> None:
        """An update has ended. A GPU's clock is only right over many: the processor runs ahead of it."""
        if reduction != self.reduction:
            self.reduction = reduction
            self._window.clear()
        self._window.append((self._elapsed(), data_seconds))
        self.measured[reduction] = sum(seconds for seconds, _ in self._window) / len(self._window)

    def pause(self) -> None:
        """Validation and saving have ended: none of it is the next update's time."""
        self._pauses.append(self._elapsed())

    @property
    def seconds(self) -> float:
        """Seconds per update, lately."""
        return max(self.measured.get(self.reduction or 0, 0.0), 1e-9)

    @property
    def data_share(self) -> float:
        """Part of that time spent waiting for data."""
        return sum(data for _, data in self._window) / max(len(self._window), 1) / self.seconds

    def remaining(self, done: int) -> float:
        """Seconds until the end after ``done`` updates of the training."""
        epoch, update = divmod(done, self.updates_per_epoch)
        left = Counter(self.reductions[epoch:])  # epochs by reduction
        updates = {reduction: epochs * self.updates_per_epoch for reduction, epochs in left.items()}
        if update:
            updates[self.reductions[epoch]] -= update
        pause = sum(self._pauses) / max(len(self._pauses), 1)
        return sum(count * self._cost(reduction) for reduction, count in updates.items()) + pause * left.total()

    def _cost(self, reduction: int) -> float:
        if reduction in self.measured:
            return self.measured[reduction]
        return self.seconds * self.relative_cost[reduction] / self.relative_cost[self.reduction or reduction]

    def _elapsed(self) -> float:
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class TrainingLog:
    """Progress bar, callbacks and summary.csv of a training; ranks but 0 show and write nothing.

    Each epoch has a line. Where stderr is not a terminal, a line every 30 seconds stands for the bar.
    The truth about a run is its trace.jsonl: ``write_summary`` makes the table from all rows each time, so that an
    interrupted run has each epoch once.

    Args:
        directory: run directory; None writes no files.
        schedule: token reduction of each epoch.
        epochs, updates_per_epoch: length of the training.
        images_per_update: over all ranks.
        relative_cost: cost of an image by token reduction, in any unit.
        first_update: updates that earlier runs have done.
        progress: show bar and text.
        elapsed: seconds that earlier runs took, for the bar.
        callbacks: who follows the training.
    """

    def __init__(
        self,
        directory: Path | None,
        schedule: RetokenizationSchedule,
        epochs: int,
        updates_per_epoch: int,
        images_per_update: int,
        relative_cost: Mapping[int, float],
        first_update: int = 0,
        progress: bool = True,
        elapsed: float = 0.0,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        reductions = [schedule.reduction_at(epoch) for epoch in range(epochs)]
        self.directory, self.epochs, self.updates_per_epoch = directory, epochs, updates_per_epoch
        self.images_per_update, self.progress = images_per_update, progress
        self.rows: list[dict[str, Any]] = []
        self.pace = Pace(reductions, updates_per_epoch, relative_cost)
        self._loss: float | None = None
        self._terminal = sys.stderr.isatty()
        self._last_printed = time.perf_counter()
        self._bar = tqdm(
            total=epochs * updates_per_epoch,
            initial=first_update,
            desc="train",
            bar_format=_BAR,
            disable=not (progress and self._terminal),
        )
        if not self._bar.disable:
            self._bar.start_t -= elapsed
        self.callbacks = callbacks

    def begin(self, info: TrainingInfo) -> None:
        """The first update is about to begin."""
        for callback in self.callbacks:
            callback.on_train_begin(info)

    def update(
        self,
        update: int,
        loss: float | None,
        lr: float,
        reduction: int,
        grad_norm: float | None = None,
        data_seconds: float = 0.0,
        terms: Mapping[str, float] | None = None,
    ) -> None:
        """The update number ``update`` of the training, from 0, has ended.

        ``loss`` and ``grad_norm`` are None where they have not been read from the device; ``data_seconds`` is how long
        the update waited for data; ``terms`` are parts of the loss by name.
        """
        self.pace.update(reduction, data_seconds)
        if loss is not None:
            self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
            scalars = {"loss": loss, "lr": lr, "images_per_second": self.images_per_second}
            scalars |= {"token_reduction": reduction, "data_share": self.pace.data_share}
            scalars |= {f"loss_{name}": term for name, term in (terms or {}).items()}
            scalars |= {} if grad_norm is None else {"grad_norm": grad_norm}
            for callback in self.callbacks:
                callback.on_update(scalars, update)
        if not self.progress:
            return
        if self._terminal:
            self._bar.set_postfix_str(self._line(update + 1), refresh=False)
            self._bar.update(update + 1 - self._bar.n)
        elif loss is not None and time.perf_counter() - self._last_printed >= QUIET_SECONDS:
            self.print(f"update {update + 1}/{self.epochs * self.updates_per_epoch}, {self._line(update + 1)}")

    def epoch(self, row: dict[str, Any]) -> None:
        """The row of an epoch that has ended, validation included."""
        self.pace.pause()
        self.rows.append(row)
        last_update = (row["epoch"] + 1) * self.updates_per_epoch - 1
        for callback in self.callbacks:
            callback.on_epoch(row, last_update)
        self.print(self._epoch_line(row))

    def end(self, summary: Mapping[str, Any]) -> None:
        """The last epoch has ended."""
        for callback in self.callbacks:
            callback.on_train_end(summary)

    def write_summary(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """summary.csv anew, a line for each of ``rows``: all epochs so far, those of earlier runs included."""
        if self.directory is None:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.directory / SUMMARY, text.getvalue())

    def print(self, text: str) -> None:
        """Lines of text above the bar, on stderr."""
        if self.progress:
            self._last_printed = time.perf_counter()
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()
        for callback in self.callbacks:
            callback.close()

    @property
    def images_per_second(self) -> float:
        """Over all ranks, lately."""
        return self.images_per_update / self.pace.seconds

    def _line(self, done: int) -> str:
        epoch = min(done // self.updates_per_epoch, self.epochs - 1)
        parts = [f"epoch {epoch}/{self.epochs}", f"reduction {self.pace.reduction}"]
        parts += [f"{self.images_per_second:.4g} images/s"]
        parts += [] if self._loss is None else [f"loss {self._loss:.4g}"]
        return ", ".join([*parts, f"{tqdm.format_interval(round(self.pace.remaining(done)))} left"])

    def _epoch_line(self, row: Mapping[str, Any]) -> str:
        """One line of what the row holds."""
        masks = "" if row.get("mask_ap") is None else f", {row['mask_ap']:.2f} % of masks"
        average = "" if row.get("ema_top1") is None else f" ({row['ema_top1']:.2f} % of the averaged weights)"
        texts = {
            "token_reduction": tokens_text,
            "train_loss": "loss {:.4g}".format,
            "top1": lambda top1: f"top-1 {top1:.2f} %{average}",
            "ap": lambda ap: f"AP {ap:.2f} % of boxes{masks}",
            "lr": "lr {:.3g}".format,
            "images_per_second": "{:.4g} images/s".format,
            "seconds": lambda seconds: tqdm.format_interval(round(seconds)),
        }
        parts = [text(row[name]) for name, text in texts.items() if row.get(name) is not None]
        return ", ".join([f"epoch {row['epoch']}/{self.epochs}", *parts])
