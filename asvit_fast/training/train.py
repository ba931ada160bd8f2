"""``train``: progressive re-tokenization, coarse tokens first (As-ViT, arXiv 2202.11921, section 3.4)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import processes
from ..backends import notify_once, rank_device
from ..errors import InputError
from ..recipe import Recipe
from ..run_directory import accuracy, best_row
from ..settings import check_kind
from ..tokens import tokens_text
from .build import What
from .callbacks import Callback, TensorBoard, TrainingInfo
from .checkpoint import (
    LAST,
    STATE_KEY,
    TrainPosition,
    TrainState,
    collect,
    last_epoch,
    read_training,
    restore,
)
from .evaluate import Evaluation, evaluate
from .interruption import Interruption, Terminated, Unreadable
from .log import TrainingLog
from .result import TrainResult
from .resume import PASSES, TrainingRun, check_resumed, check_same_stream, what_changes
from .rng import random_state, seed_everything, seed_words, set_random_state, to_seed
from .schedule import RetokenizationSchedule
from .step import Batches, FiniteGuard, raised_recompile_limit
from .training_setup import Data, TrainingSetup


def train(
    model: What,
    data: Data,
    *,
    schedule: str | RetokenizationSchedule = "1",
    epochs: int = 300,
    out: str | os.PathLike[str] | None = None,
    img_size: int | tuple[int, int] = 224,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    initial_checkpoint: str = "",
    resume: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **recipe: Any,
) -> TrainResult:
    """Train a network, coarse tokens first where the schedule says so. Under torchrun, on all its processes.

    A run directory that holds a begun training of the same options continues it, to the same bits on a CPU. It may go
    on with other numbers of processes and images of a pass, as long as an update keeps its images, and with other
    ``epochs``, beyond those that are trained, as long as these keep their tokens. SIGTERM, where the program does not
    handle it itself, leaves a checkpoint of that moment.

    Args:
        model: a topology or its text, a name that timm knows, or a network (of re-tokenizable patches, if ``schedule``
            reduces tokens).
        data: a folder or what timm's data sets take (see ``dataset`` of the recipe), or a pair of data sets (training,
            validation or None).
        schedule: epochs:reduction per side, "40:4,30:2,230:1"; fractions of the training, "0.3:4,0.7:1"; a name of
            Table 6, "table6-80"; "1" for full tokens throughout.
        out: run directory: last.pth.tar and model_best.pth.tar in timm's format, trace.jsonl, summary.csv, events of
            TensorBoard. None keeps nothing.
        img_size: pixels, a side or (height, width).
        num_classes: by default as many as the data has.
        model_kwargs: further arguments of the network.
        initial_checkpoint: weights to start from: a file in timm's format, or the folder of a training (its best).
        resume: checkpoint of timm's train.py (or ours) whose training this one continues: weights, optimizer, average.
        progress: show a bar and lines of text, on stderr.
        callbacks: who follows the training, besides TensorBoard in the run directory: ``WandbTracker``,
            ``MlflowTracker``, your own ``Callback``.
        recipe: the fields of ``Recipe``.

    Raises:
        InputError: an option or data that cannot be used (before any work), an image that cannot be read, a loss that
            is not a number, a checkpoint that cannot be written; the last good checkpoint stays.
        SystemExit: with code 143, after SIGTERM and a checkpoint.

    Examples:
        >>> import torch, asvit_fast as af
        >>> images = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 2)
        >>> result = af.train("4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8", (images, images), schedule="1:2,1:1", epochs=2,
        ...                   img_size=32, batch_size=8, workers=0, device="cpu", progress=False)
        >>> [row["token_reduction"] for row in result.epochs]
        [2, 1]
    """
    check_kind("model", model, What, "a topology, the name of a model, or a Module")
    check_kind("data", data, str | Path | tuple | list, "a folder, or a pair of data sets (training, validation)")
    return Trainer(
        model,
        data,
        RetokenizationSchedule.parse(schedule).for_epochs(epochs),
        Recipe.of(**recipe),
        epochs,
        rank_device(device),
        out=None if out is None else Path(out),
        img_size=img_size,
        num_classes=num_classes,
        model_kwargs=model_kwargs,
        initial_checkpoint=initial_checkpoint,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
    ).run()


class Trainer(TrainingSetup):
    """One training: ``run`` does it, ``iterate`` epoch by epoch."""

    def __post_init__(self) -> None:
        self.resumed = read_training(self.resume) if self.resume else None  # before any work
        super().__post_init__()
        self.interruption = Interruption()
        self.guard = FiniteGuard(self.step, self.updates_per_epoch, self.out and self.out / LAST)
        self.position = TrainPosition()
        self.reduction = self.schedule.reduction_at(0)
        self.rows: list[dict[str, Any]] = []
        self.news = ""  # what has changed since the run was begun

    # ------------------------------------------------------------------ running

    def run(self) -> TrainResult:
        """Train, or do what is left of it; after SIGTERM, up to a checkpoint."""
        with contextlib.nullcontext() if self.out is None else self.interruption.listening():
            for _ in self.iterate():
                pass
        return self.result

    def iterate(self) -> Iterator[dict[str, Any]]:
        """Train epoch by epoch; yields their rows as they end."""
        with TrainingRun(self.out, self.config()) as self.kept:
            self.rows = self.kept.rows
            continued = self._restore()
            self.log = TrainingLog(
                self.out if self.rank == 0 else None,
                self.schedule,
                self.epochs,
                self.updates_per_epoch,
                self.images_per_update,
                self.cost.macs,
                first_update=self._updates_done(),
                progress=self.progress and self.rank == 0,
                elapsed=sum(row["seconds"] for row in self.rows) + self.position.seconds,
                callbacks=self._callbacks(),
            )
            try:
                self._announce(continued)
                self.log.begin(self._info())
                with raised_recompile_limit(self.recipe):
                    self._warm_up()
                while self.position.epoch < self.epochs:
                    with raised_recompile_limit(self.recipe):
                        self._train_epoch()
                        self._end_epoch()
                    yield self.rows[-1]
                self.retokenizer.step(self.epochs - 1)
                self._finish()
            finally:
                self.log.close()

    def _callbacks(self) -> Sequence[Callback]:
        """Who follows what is left of the training."""
        return (TensorBoard(), *self.callbacks) if self.rank == 0 and self.position.epoch < self.epochs else ()

    def _finish(self) -> None:
        summary = self._summary()
        self.kept.finish(summary)
        self.log.end(summary)

    def _info(self) -> TrainingInfo:
        """What callbacks may know."""
        return TrainingInfo(
            config=self.config(),
            model=self.step.model,
            directory=self.out,
            epochs=self.epochs,
            updates_per_epoch=self.updates_per_epoch,
            first_update=self._updates_done(),
            print=self.log.print,
        )

    def _updates_done(self) -> int:
        return self.position.epoch * self.updates_per_epoch + self.position.update

    def _announce(self, continued: bool) -> None:
        notes = (f"Note: {note}" for note in self.notes())
        if self.out is not None:
            self.log.print(f"Writing to {self.out}; stop at any time, the same command continues.")
        for line in (*self.description_lines(), *notes, *filter(None, [self.news])):
            self.log.print(line)
        if continued and self.position.epoch < self.epochs:
            self.log.print(f"continuing in epoch {self.position.epoch}, after {self.position.update} updates of it")

    def _warm_up(self) -> None:
        """Compile and tune for every grid and batch now, so that no phase and no validation waits for it."""
        if self.position.epoch == self.epochs or not (self.recipe.torchcompile or self.device.type == "cuda"):
            return

        def zeros(size: int) -> Tensor:  # [B, 3, H, W]
            return torch.zeros(size, *self.reader.shape, device=self.device)

        self.retokenizer.warmup(
            lambda reduction: zeros(self.batch_sizes[reduction]), autocast=self.step.forward_context, evaluate=False
        )
        if not self.images.has_validation:
            return
        for epoch in self.schedule.starts:
            self.retokenizer.step(epoch)
            for size in self.images.eval_batch_sizes(self.recipe.batch_size):
                targets = torch.zeros(size, dtype=torch.int64, device=self.device)  # [B]
                for network in (self.step.model, *self.step.averages):
                    self._evaluate(network, [(zeros(size), targets)])

    def _train_epoch(self) -> None:
        """Do the updates of this epoch that are left."""
        position, per_rank = self.position, self.images_per_update // self.ranks
        if self.retokenizer.step(position.epoch) and position.epoch:
            self.log.print(f"epoch {position.epoch}: {tokens_text(self.retokenizer.reduction)} from here on")
        self.reduction = self.retokenizer.reduction
        size = self.batch_sizes[self.reduction]
        batches = self.interruption.in_step(self.images.train_batches(position.epoch, position.update * per_rank, size))
        self.step.replica.train()
        started = time.perf_counter() - position.seconds
        while position.update < self.updates_per_epoch:
            update = self._updates_done()
            self.scheduler.step_update(update)
            loss = self._update(batches, per_rank // size, update)  # []
            self.guard.watch(loss.isfinite(), update)
            position.update += 1
            position.loss_sum = position.loss_sum + loss.double()
            last = position.update == self.updates_per_epoch
            read = last or position.update % self.recipe.log_interval == 0 or self.device.type == "cpu"
            if read:  # on a GPU, looking means waiting
                self.guard.check()
            self._report(update, loss, read)
            position.seconds = time.perf_counter() - started
            if not last and self.recipe.checkpoint_interval and position.update % self.recipe.checkpoint_interval == 0:
                self._save()
                started = time.perf_counter() - position.seconds

    def _update(self, batches: Batches, passes: int, update: int) -> Tensor:
        """One update; where it cannot have its images, all before it is kept and the training ends."""
        before = random_state(self.device)
        buffers = [(b, b.clone()) for b in self.step.model.buffers()] if passes > 1 else []  # such as BatchNorm's
        try:
            return self.step(batches, passes, update)
        except (Terminated, Unreadable) as reason:
            set_random_state(before, self.device)
            for buffer, value in buffers:
                buffer.copy_(value)
            self._save_before_the_end(reason)
            raise

    def _report(self, update: int, loss: Tensor, read: bool) -> None:
        norm = self.step.grad_norm
        self.log.update(
            update,
            loss.item() if read else None,
            self.step.lr,
            self.reduction,
            grad_norm=norm.item() if read and norm is not None else None,
            data_seconds=self.step.data_seconds,
            terms=self.step.terms if read else None,
        )

    def _end_epoch(self) -> None:
        """Validate, write the row of the epoch and the checkpoint after it."""
        position = self.position
        row = {
            "epoch": position.epoch,
            "token_reduction": self.reduction,
            "train_loss": self._mean(position.loss_sum / self.updates_per_epoch),
            "lr": self.step.lr,
            "train_seconds": position.seconds,
            "images_per_second": self.updates_per_epoch * self.images_per_update / max(position.seconds, 1e-9),
        }
        self.guard.check_weights(self._updates_done() - 1)
        started = time.perf_counter()
        due = (position.epoch + 1) % self.recipe.eval_interval == 0 or position.epoch + 1 == self.epochs
        if self.images.has_validation and due:
            try:
                row |= self._validate()
            except (Terminated, Unreadable) as reason:
                self._save_before_the_end(reason)
                raise
        row["seconds"] = position.seconds + time.perf_counter() - started
        self.position = TrainPosition(position.epoch + 1)
        self.kept.record(row, self._state([*self.rows, row]))
        self.log.epoch(row)
        self.log.write_summary(self.rows)

    def _validate(self) -> dict[str, float]:
        """Validate on the grid of this phase: the network has seen no other yet."""
        result = self._evaluate(self.step.model, self.images.eval_batches(self.recipe.batch_size))
        row = {"top1": result.top1, "top5": result.top5, "eval_loss": result.loss}
        for average in self.step.averages:
            result = self._evaluate(average, self.images.eval_batches(self.recipe.batch_size))
            row |= {"ema_top1": result.top1, "ema_top5": result.top5, "ema_loss": result.loss}
        return row

    def _evaluate(self, network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        images = self.interruption.until_stopped(batches)
        try:
            result = evaluate(network, images, self.device, autocast=self.step.autocast, ranks=self.ranks)
        except InputError:  # there are no images, on any rank: perhaps because all were stopped
            self.interruption.raise_if_stopped()
            raise
        self.interruption.raise_if_stopped()
        return result

    def _mean(self, value: Tensor) -> float:
        """Mean over the ranks."""
        value = value.to(self.device, copy=True)  # []
        if self.ranks > 1:
            dist.all_reduce(value)
        return value.item() / self.ranks

    # ------------------------------------------------------------------ keeping and going on

    def _restore(self) -> bool:
        """Go on where the run directory, or the checkpoint to resume, stands; then the generators of this rank."""
        now, begun = self._train_state(), self.kept.load()
        state, self.resumed = begun or self.resumed, None
        if state is not None:
            check_same_stream(TrainState.of(state), self.images.is_stream, self.ranks, self.recipe.workers)
            if begun is None:
                check_resumed(state, now, self.schedule)
        self.kept.settle_changes(begun, self.schedule, self.epochs)
        if state is not None:
            self._load(state, now)
        else:
            seed_everything(self.recipe.seed + self.rank, self.device)
        if begun is not None and self.position.update == 0:
            self.kept.keep_best()  # a kill may have come between the checkpoint and this
        return state is not None

    def _load(self, state: dict[str, Any], now: TrainState) -> None:
        restore(self.step, state)
        begun = TrainState.of(state)
        if begun is None:  # of timm's train.py
            self.position = TrainPosition(last_epoch(state) + 1)
            seed_everything(self.recipe.seed + self.rank, self.device)
            return
        self.position = begun.position(self.rank, self.ranks)
        if begun.processes == self.ranks:
            set_random_state(begun.random[self.rank], self.device)
        else:
            words = seed_words(self.recipe.seed, begun.epoch, begun.update, self.rank)
            seed_everything(to_seed(words), self.device)
        self._compare(begun, now)

    def _compare(self, begun: TrainState, now: TrainState) -> None:
        """Warn where updates are cut in other ways than until now; they hold the same images in any case."""
        pairs = [(name, getattr(begun, name), getattr(now, name)) for name in ("processes", *PASSES)]
        changes = [f"{name} {before!r} -> {value!r}" for name, before, value in pairs if before != value]
        if not changes:
            self.batch_sizes |= begun.batch_sizes  # as they were measured then
        elif self.rank == 0:
            text = f"this training goes on with {', '.join(changes)}: correct, but not to the same bits"
            notify_once(("another cut", self.out, *changes), text)
        self.news = what_changes(begun, now, self.recipe)

    def _save_before_the_end(self, reason: BaseException) -> None:
        self._save()
        if isinstance(reason, Terminated) and self.out is not None:
            self.log.print(
                f"terminated in epoch {self.position.epoch}, after {self.position.update} updates of it; "
                f"{self.out / LAST} holds them, the same command continues"
            )

    def _save(self) -> None:
        self.guard.check_weights(max(self._updates_done() - 1, 0))
        self.kept.save(self._state(self.rows))

    def _state(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A checkpoint in timm's format, and under ``STATE_KEY`` what it takes to go on to the same bits."""
        if self.out is None:
            return {}
        state = collect(self.step, self.description["model"], self._arguments(), self.position.epoch - 1)
        best = best_row(rows)
        if best is not None:
            state["metric"] = accuracy(best)
        state[STATE_KEY] = self._train_state().to_dict()
        return state

    def _arguments(self) -> dict[str, Any]:
        """What a checkpoint says of its network, and of how images are prepared."""
        prepared = {name: getattr(self.recipe, name) for name in ("crop_pct", "crop_mode", "interpolation")}
        return {**self.description, **prepared, "label_names": self.images.class_names}

    def _train_state(self) -> TrainState:
        """The place and the options of this training; every rank must call it."""
        ranks = processes.gather((self.position.loss_sum.item(), random_state(self.device)))
        return TrainState(
            epoch=self.position.epoch,
            update=self.position.update,
            seconds=self.position.seconds,
            losses=[loss for loss, _ in ranks],
            random=[states for _, states in ranks],
            token_reduction=self.reduction,
            batch_sizes=self.batch_sizes,
            epochs=self.epochs,
            schedule=str(self.schedule),
            images_per_update=self.images_per_update,
            updates_per_epoch=self.updates_per_epoch,
            seed=self.recipe.seed,
            workers=self.recipe.workers,
            **{name: getattr(self.recipe, name) for name in PASSES},
        )

    def _summary(self) -> dict[str, Any]:
        """The result that the run directory keeps."""
        result = self.result
        return {
            "model": self.description["model"],
            "epochs": self.epochs,
            "top1": result.top1,
            "best": result.best,
            "train_seconds": result.seconds,
            "saving": result.cost.saving,
        }

    @property
    def result(self) -> TrainResult:
        """The result of the training so far."""
        average = next(iter(self.step.averages), None)
        return TrainResult(self.step.model, average, self.rows, self.schedule, self.cost, self.out)
