"""With which other options a training may go on, and what a run directory must hold for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends import notify_once
from ..errors import InputError
from ..files import as_float
from ..folder_lock import FolderLock
from ..recipe import Recipe
from ..run_directory import CONFIG, DamagedState, RunDirectory
from .checkpoint import BEST, LAST, last_epoch, link_or_copy
from .optimization import learning_rate
from .schedule import REDUCTIONS, RetokenizationSchedule
from .state import TrainState

PASSES = ("batch_size", "grad_accum_steps", "phase_batch_sizes")  # how the images of an update are cut
SAME = ("images_per_update", "train_images")  # whatever else changes
CHANGEABLE = (
    "processes", "epochs", "schedule", "saving", *(f"flops.{reduction}" for reduction in REDUCTIONS), *PASSES, *SAME,
)  # fmt: skip
COUNTS = ("epoch", "token_reduction")  # numbers of a row that every row has
MEASURES = ("train_loss", "lr", "train_seconds", "images_per_second", "seconds")
VALIDATION = ("top1", "top5", "eval_loss", "ema_top1", "ema_top5", "ema_loss")  # that some rows have


def reason_to_refuse(
    changes: Mapping[str, tuple[Any, Any]], begun: TrainState | None, schedule: RetokenizationSchedule, epochs: int
) -> str | None:
    """Why a run cannot go on with options that differ from its own; None where what is done stays right.

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


def settle_changes(
    run: RunDirectory,
    rows: list[dict[str, Any]],
    state: dict[str, Any] | None,
    schedule: RetokenizationSchedule,
    epochs: int,
) -> None:
    """Write down with which other options a run goes on from its ``rows`` and ``state``. Raises InputError."""
    if not run.changes:
        return
    reason = reason_to_refuse(run.changes, None if state is None else TrainState.of(state), schedule, epochs)
    if reason is not None:
        raise run.refuse_changes(reason)
    run.accept_changes(list(rows), state)
    run.state = None  # it is large


def what_changes(begun: TrainState, recipe: Recipe, images_per_update: int, epochs: int) -> str:
    """What another number of epochs means, in a line; "" where it is the same."""
    if begun.epochs == epochs:
        return ""
    done = begun.epoch * begun.updates_per_epoch + begun.update
    now, before = (
        learning_rate(recipe, images_per_update, length, begun.updates_per_epoch, done)
        for length in (epochs, begun.epochs)
    )
    return (
        f"epochs {begun.epochs} -> {epochs}: from here on the learning rate is that of a training of {epochs} epochs, "
        f"{now:.3g} for the next update ({before:.3g} with {begun.epochs}); what is trained already had the old one"
    )


def check_resumed(
    state: Mapping[str, Any], schedule: RetokenizationSchedule, epochs: int, cut: Mapping[str, int]
) -> None:
    """Whether a training may begin with the state of another run: between epochs with any options, inside one with
    those that say which images an update holds.

    Raises:
        InputError: naming what differs; or no epoch is left.
    """
    begun = TrainState.of(state)
    done = last_epoch(state) + 1 if begun is None else begun.epoch
    if done >= epochs:
        raise InputError(f"the checkpoint to resume has {done} epochs behind it, epochs is {epochs}: give more")
    if begun is None or begun.update == 0:
        return
    here = {**cut, "token_reduction": schedule.reduction_at(begun.epoch)}
    for name, value in here.items():
        if getattr(begun, name) != value:
            raise InputError(
                f"the checkpoint to resume stands inside epoch {begun.epoch}, with {name} {getattr(begun, name)}, not "
                f"{value}; give the options that it was begun with, or take its weights alone as initial_checkpoint"
            )


def check_same_stream(begun: TrainState | None, is_stream: bool, ranks: int, workers: int) -> None:
    """A stream deals its images out to ranks and workers as it is read: with others, the rest of an epoch would hold
    images that were seen, and lack some. Raises InputError."""
    if begun is None or not is_stream or begun.update == 0:
        return
    for name, before, now in (("processes", begun.processes, ranks), ("workers", begun.workers, workers)):
        if before != now:
            raise InputError(
                f"this training stands inside epoch {begun.epoch}, whose images are a stream that {before} {name} "
                f"share: {now} would see some of them twice and others never; go on with {before} until the epoch ends"
            )


def open_run(out: Path | None, config: dict[str, Any]) -> RunDirectory:
    """The run directory of a training, begun or continued. Raises InputError as RunDirectory does."""
    if out is not None:
        recover_last(out)
    try:
        return RunDirectory(out, config, LAST, changeable=CHANGEABLE)
    except InputError as error:
        if out is not None and isinstance(error.__cause__, DamagedState) and (out / BEST).is_file():
            raise InputError(f"{error}, or delete it to go on from {BEST}") from error
        raise


def recover_last(out: Path) -> None:
    """Where the last checkpoint of a run is lost, its best one takes its place: epochs after it are trained again."""
    if (out / LAST).exists() or not ((out / BEST).is_file() and (out / CONFIG).is_file()):
        return
    lock = FolderLock(out)
    try:
        link_or_copy(out / BEST, out / LAST)
    finally:
        lock.release()
    notify_once(("lost", out), f"{out / LAST} is missing: the training goes on from {BEST}, to the same end")


def checked_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows of the epochs on record, with numbers for what JSON has no numbers for. Raises InputError for a damaged
    one."""
    return [_checked(run, step, row) for step, row in enumerate(run.trace)]


def _checked(run: RunDirectory, step: int, row: dict[str, Any]) -> dict[str, Any]:
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
