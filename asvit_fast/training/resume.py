"""Going on with a training: its run directory, and with which other options it may continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import processes
from ..backends import notify_once
from ..errors import InputError
from ..files import as_float, checksums_fit
from ..folder_lock import FolderLock
from ..recipe import Recipe
from ..run_directory import AP_MEASURES, AVERAGE, CONFIG, MASK, DamagedState, RunDirectory, best_row, load_state
from ..tokens import REDUCTIONS
from .checkpoint import BEST, LAST, TrainState, last_epoch, link_or_copy
from .schedule import RetokenizationSchedule
from .step import learning_rate

PASSES = ("batch_size", "grad_accum_steps", "phase_batch_sizes")  # how the images of an update are cut
SAME = ("images_per_update", "train_images")  # whatever else changes
CHANGEABLE = (
    "processes", "epochs", "schedule", "saving", *(f"flops.{reduction}" for reduction in REDUCTIONS), *PASSES, *SAME,
    "recipe.bad_images",
)  # fmt: skip
# choices that change how a training runs, not what it computes
CHANGEABLE_ON_RESUME = (
    "workers", "checkpoint_interval", "log_interval", "eval_interval", "parallel", "torchcompile", "grad_checkpointing",
    *PASSES,
)  # fmt: skip
COUNTS = ("epoch", "token_reduction")  # numbers of a row that every row has
MEASURES = ("train_loss", "lr", "train_seconds", "images_per_second", "seconds")
VALIDATION = (  # that some rows have
    *("top1", "top5", "eval_loss", "ema_top1", "ema_top5", "ema_loss"),
    *(f"{average}{kind}{name}" for average in ("", AVERAGE) for kind in ("", MASK) for name in AP_MEASURES),
)


class TrainingRun:
    """The record of a training: ``rows`` of its epochs on every rank, and a run directory that rank 0 alone writes.

    Args:
        out: the run directory; None keeps nothing.
        config: what it must agree on with a run that it continues.

    Raises:
        InputError: as RunDirectory does, or a damaged row.
    """

    def __init__(self, out: Path | None, config: dict[str, Any]) -> None:
        self.out = out
        self._directory: RunDirectory | None = None
        self.rows: list[dict[str, Any]] = list(processes.run_on_rank0(lambda: self._open(config)))

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *error: object) -> None:
        if self._directory is not None:
            self._directory.close()

    def _open(self, config: dict[str, Any]) -> list[dict[str, Any]]:
        if self.out is not None:
            recover_last(self.out)
        try:
            self._directory = RunDirectory(self.out, config, LAST, changeable=CHANGEABLE)
        except InputError as error:
            if self.out is not None and isinstance(error.__cause__, DamagedState) and _is_whole(self.out / BEST):
                raise InputError(f"{error}, or delete it to go on from {BEST}") from error
            raise
        rows = [_checked_row(self._directory, step, row) for step, row in enumerate(self._directory.trace)]
        if self.out is not None:
            check_best(self.out, rows)
        return rows

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, on every rank; None where nothing has begun."""
        if not processes.broadcast(self._directory is not None and self._directory.state is not None):
            return None
        assert self.out is not None
        state = load_state(self.out / LAST) if self._directory is None else self._directory.state
        self._forget_state()
        return state

    def settle_changes(self, state: dict[str, Any] | None, schedule: RetokenizationSchedule, epochs: int) -> None:
        """Write down with which other options the run goes on from its rows and ``state``. Raises InputError."""

        def settle(run: RunDirectory) -> None:
            if run.changes:
                reason = reason_to_refuse(run.changes, TrainState.of(state or {}), schedule, epochs)
                if reason is not None:
                    raise run.refuse_changes(reason)
                run.accept_changes(list(self.rows), state)

        processes.run_on_rank0(lambda: None if self._directory is None else settle(self._directory))
        self._forget_state()

    def record(self, row: dict[str, Any], state: dict[str, Any]) -> None:
        """Keep a finished epoch and the checkpoint after it."""
        self.rows.append(row)
        if self._directory is not None:
            self._directory.record(row, state)
        self._forget_state()
        self.keep_best()

    def save(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint inside an epoch."""
        if self._directory is not None:
            self._directory.save(state)
        self._forget_state()

    def keep_best(self) -> None:
        """After an epoch that was the best so far, keep its checkpoint."""
        if self._directory is not None and self.out and self.rows and best_row(self.rows) is self.rows[-1]:
            link_or_copy(self.out / LAST, self.out / BEST)

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep the result of the training, once."""
        if self._directory is not None and self._directory.result is None:
            self._directory.finish(summary)

    def _forget_state(self) -> None:
        if self._directory is not None:
            self._directory.state = None  # it is large


def recover_last(out: Path) -> None:
    """Put the best checkpoint in the place of a lost last one: epochs after it are trained again."""
    if (out / LAST).exists() or not ((out / BEST).is_file() and (out / CONFIG).is_file()):
        return
    if not _is_whole(out / BEST):
        raise InputError(
            f"{out / LAST} is missing and {out / BEST} is damaged: restore one of them, or choose another run directory"
        )
    lock = FolderLock(out)
    try:
        link_or_copy(out / BEST, out / LAST)
    finally:
        lock.release()
    notify_once(("lost", out), f"{out / LAST} is missing: the training goes on from {BEST}, to the same end")


def _is_whole(path: Path) -> bool:
    return path.is_file() and checksums_fit(path)


def check_best(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Whether the best checkpoint of a run is there. Raises InputError where it is damaged; warns where it is lost."""
    if (out / BEST).is_file() and not _is_whole(out / BEST):
        raise InputError(
            f"{out / BEST} is damaged: restore it, or delete it to go on with {LAST} alone, which is whole"
        )
    best = best_row(rows)
    if best is not None and best is not rows[-1] and not (out / BEST).exists():
        text = f"{out / BEST} is lost: until an epoch is better than epoch {best['epoch']}, {LAST} takes its place"
        notify_once(("lost", out / BEST), text)


def _checked_row(run: RunDirectory, step: int, row: dict[str, Any]) -> dict[str, Any]:
    """Check the row of an epoch on record; what JSON has no numbers for becomes one."""
    for name in COUNTS:
        if type(row.get(name)) is not int or row[name] < 0:
            raise run.damaged_line(step, f"{name} must be a whole number, got {row.get(name)!r}")
    numbers = dict(row)
    for name in (*MEASURES, *(name for name in VALIDATION if row.get(name) is not None)):
        try:
            numbers[name] = as_float(row.get(name, ""))
        except (TypeError, ValueError):
            raise run.damaged_line(step, f"{name} must be a number, got {row.get(name)!r}") from None
    return numbers


# --------------------------------------------------------------------------- other options


def reason_to_refuse(
    changes: Mapping[str, tuple[Any, Any]], begun: TrainState | None, schedule: RetokenizationSchedule, epochs: int
) -> str | None:
    """Say why a run cannot go on with options that differ from its own; None where what is done stays right.

    Sound are other processes and other passes, as long as an update keeps its images, and another number of epochs, as
    long as the epochs that are begun keep their tokens.
    """
    for name in SAME:
        if name in changes:
            return (
                f"{name} must stay {changes[name][0]}: the learning rate and the place in the epoch depend on it (an "
                "update takes batch_size x grad_accum_steps x processes images)"
            )
    if begun is None:
        return None
    if "epochs" in changes and epochs <= begun.epoch:
        return f"{begun.epoch} epochs are trained already: give more"
    past = RetokenizationSchedule.parse(begun.schedule)
    for epoch in range(begun.epoch + (begun.update > 0)):
        before, now = past.reduction_at(epoch), schedule.reduction_at(epoch)
        if before != now:
            return (
                f"epoch {epoch} was trained with token reduction {before}, and schedule '{schedule}' has {now} there: "
                "give phases in epochs that begin as those did"
            )
    return None


def what_changes(begun: TrainState, now: TrainState, recipe: Recipe) -> str:
    """Say what another number of epochs means, in a line; "" where it is the same."""
    if begun.epochs == now.epochs:
        return ""
    done = begun.epoch * begun.updates_per_epoch + begun.update
    new, old = (
        learning_rate(recipe, now.images_per_update, state.epochs, begun.updates_per_epoch, done)
        for state in (now, begun)
    )
    return (
        f"epochs {begun.epochs} -> {now.epochs}: from here on the learning rate is that of a training of {now.epochs} "
        f"epochs, {new:.3g} for the next update ({old:.3g} with {begun.epochs}); what is trained already had the old "
        "one"
    )


def check_resumed(state: Mapping[str, Any], now: TrainState, schedule: RetokenizationSchedule) -> None:
    """Check that a training may begin with the state of another run: between epochs with any options, inside one with
    those that say which images an update holds.

    Raises:
        InputError: naming what differs; or no epoch is left.
    """
    begun = TrainState.of(state)
    done = last_epoch(state) + 1 if begun is None else begun.epoch
    if done >= now.epochs:
        raise InputError(f"the checkpoint to resume has {done} epochs behind it, epochs is {now.epochs}: give more")
    if begun is None or begun.update == 0:
        return
    now = dataclasses.replace(now, token_reduction=schedule.reduction_at(begun.epoch))
    for name in ("images_per_update", "updates_per_epoch", "seed", "token_reduction"):
        before, value = getattr(begun, name), getattr(now, name)
        if before != value:
            raise InputError(
                f"the checkpoint to resume stands inside epoch {begun.epoch}, with {name} {before}, not {value}; give "
                "the options that it was begun with, or take its weights alone as initial_checkpoint"
            )


def check_same_stream(begun: TrainState | None, is_stream: bool, ranks: int, workers: int) -> None:
    """Check that a stream is shared as before: it deals its images out to ranks and workers as it is read, so with
    others the rest of an epoch would hold images that were seen, and lack some. Raises InputError."""
    if begun is None or not is_stream or begun.update == 0:
        return
    for name, before, now in (("processes", begun.processes, ranks), ("workers", begun.workers, workers)):
        if before != now:
            raise InputError(
                f"this training stands inside epoch {begun.epoch}, whose images are a stream that {before} {name} "
                f"share: {now} would see some of them twice and others never; go on with {before} until the epoch ends"
            )
