"""The training loop: epochs, phases, validation, checkpoints. Everything that survives a kill is in ``_state``."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import to_2tuple
from torch import Tensor, nn

from .. import processes
from ..backends import notify_once
from ..cost import params
from ..errors import InputError
from ..recipe import Recipe
from ..run_directory import RunDirectory, load_state
from .batch_size import least_of_ranks, pass_memory, phase_batch_sizes
from .checkpoint import (
    BEST,
    LAST,
    STATE_KEY,
    last_epoch,
    link_or_copy,
    random_state,
    read_file,
    seed_everything,
    set_random_state,
    weights_of,
)
from .continuation import (
    PASSES,
    check_resumed,
    check_same_stream,
    checked_rows,
    open_run,
    settle_changes,
    what_changes,
)
from .data import DataSets, load_data
from .evaluate import Evaluation, evaluate
from .interruption import Interruption, Terminated, Unreadable
from .log import TrainingLog, tokens
from .network import What, channels_of, create_network, pixel_statistics
from .optimization import make_scheduler
from .result import TrainResult, best_row, metric
from .retokenizer import Retokenizer
from .rng import seed_words, to_seed
from .schedule import RetokenizationSchedule
from .schedule_cost import schedule_cost
from .state import TrainPosition, TrainState, collect, restore
from .step import Batches, LossGuard, autocast, make_step, prepare, raised_recompile_limit, weights_are_finite

Data = str | Path | DataSets
# choices that change how a training runs, not what it computes: a run may go on with others
CHANGEABLE_ON_RESUME = (
    "workers", "checkpoint_interval", "log_interval", "eval_interval", "parallel", "torchcompile", "grad_checkpointing",
    *PASSES,
)  # fmt: skip


class Trainer:
    """One training; see ``train`` for the arguments. ``run`` does it, ``iterate`` epoch by epoch."""

    def __init__(
        self,
        what: What,
        data: Data,
        schedule: RetokenizationSchedule,
        recipe: Recipe,
        *,
        epochs: int,
        out: Path | None,
        img_size: int | tuple[int, int],
        num_classes: int | None,
        network: Mapping[str, Any],
        resume: str,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.schedule, self.recipe, self.epochs, self.out, self.device = schedule, recipe, epochs, out, device
        self.ranks = processes.init_process_group(device)
        self.rank = processes.rank()
        self.resume: dict[str, Any] | None = None
        if resume:
            content = read_file(resume)
            self.resume = {**content, "state_dict": weights_of(content, resume)}
        seed_everything(recipe.seed, device)
        channels = channels_of(what, network.get("model_kwargs"))
        mean, std = pixel_statistics(what, recipe, channels)
        self.data = load_data(
            data, recipe, img_size, device, self.rank, self.ranks, channels, mean, std, num_classes=num_classes
        )
        model, self.description = create_network(
            what, self.data.num_classes, img_size, drop_path=recipe.drop_path, **network
        )
        self.description |= {"mean": list(mean), "std": list(std)}
        self.image = (channels, *to_2tuple(img_size))
        self.cost = schedule_cost(model, schedule, img_size)
        prepare(model, recipe, device)
        memory = pass_memory(model, self.image, device, lambda: autocast(recipe, device))
        self.batch_sizes = least_of_ranks(phase_batch_sizes(recipe, schedule.reductions, memory))
        self.step = make_step(model, recipe, device, self.description["num_classes"], self.images_per_update)
        self.retokenizer = Retokenizer(self.step.replica, schedule, *self.step.averages)
        self.updates_per_epoch = self._updates_per_epoch()
        self.scheduler = make_scheduler(recipe, self.step.optimizer, epochs, self.updates_per_epoch)
        self.interruption = Interruption()
        self.guard = LossGuard(device)
        self.position = TrainPosition()
        self.reduction = self.schedule.reduction_at(0)
        self.rows: list[dict[str, Any]] = []
        self.news = ""  # what has changed since the run was begun
        self.progress = progress
        self.config = self._config(data)

    # ------------------------------------------------------------------ setting up

    @property
    def images_per_update(self) -> int:
        """Over all ranks."""
        return self.recipe.batch_size * self.recipe.grad_accum_steps * self.ranks

    def _updates_per_epoch(self) -> int:
        per_rank = self.images_per_update // self.ranks
        if self.data.images_per_rank < per_rank:
            raise InputError(
                f"{self.data.train_images} images are fewer than one update takes ({self.images_per_update}); "
                f"lower batch_size ({self.recipe.batch_size}) or grad_accum_steps ({self.recipe.grad_accum_steps})"
            )
        return self.data.images_per_rank // per_rank

    def _config(self, data: Data) -> dict[str, Any]:
        """What a run directory must agree on with a run that continues it."""
        choices = {
            name: value for name, value in dataclasses.asdict(self.recipe).items() if name not in CHANGEABLE_ON_RESUME
        }
        return {
            "kind": "train",
            "model": self.description,
            "data": str(data) if isinstance(data, (str, Path)) else "data sets",
            "train_images": self.updates_per_epoch * self.images_per_update,  # of an epoch
            "schedule": str(self.schedule),
            "epochs": self.epochs,
            "images_per_update": self.images_per_update,
            "flops": {str(reduction): macs for reduction, macs in self.cost.macs.items()},
            "saving": self.cost.saving,
            "processes": self.ranks,
            **{name: getattr(self.recipe, name) for name in PASSES},
            "recipe": choices,
        }

    # ------------------------------------------------------------------ running

    def run(self) -> TrainResult:
        """The whole training, or what is left of it; after SIGTERM, up to a checkpoint."""
        with contextlib.nullcontext() if self.out is None else self.interruption.listening():
            for _ in self.iterate():
                pass
        return self.result

    def iterate(self) -> Iterator[dict[str, Any]]:
        """The same, epoch by epoch: their rows as they end."""
        with self._open() as run:
            state = self._restore(run)
            self.log = TrainingLog(
                self.out if self.rank == 0 else None,
                self.schedule,
                self.epochs,
                self.updates_per_epoch,
                self.images_per_update,
                self.cost.macs,
                first_update=self.position.epoch * self.updates_per_epoch + self.position.update,
                progress=self.progress and self.rank == 0,
                elapsed=sum(row["seconds"] for row in self.rows) + self.position.seconds,
            )
            try:
                self._announce(state)
                with raised_recompile_limit(self.recipe):
                    self._warm_up()
                while self.position.epoch < self.epochs:
                    with raised_recompile_limit(self.recipe):
                        self._train_epoch(run)
                        self._end_epoch(run)
                    yield self.rows[-1]
            finally:
                self.log.close()
            self.retokenizer.step(self.epochs - 1)
            if self.rank == 0 and run.result is None:
                run.finish(self._summary())

    def _open(self) -> RunDirectory:
        """The run directory, which rank 0 alone holds and writes."""
        mine: list[RunDirectory] = []

        def rows() -> list[dict[str, Any]]:
            mine.append(open_run(self.out, self.config))
            return checked_rows(mine[0])

        self.rows = list(processes.run_on_rank0(rows))
        return mine[0] if mine else RunDirectory(None, self.config, LAST)

    def _restore(self, run: RunDirectory) -> dict[str, Any] | None:
        """Go on where the run directory, or the checkpoint to resume, stands; then the generators of this rank."""
        begun = processes.broadcast(run.state is not None)
        state = self.resume
        if begun:
            assert self.out is not None
            state = run.state if run.state is not None else load_state(self.out / LAST)
            run.state = None  # it is large
        if state is not None:
            check_same_stream(TrainState.of(state), self.data.is_stream, self.ranks, self.recipe.workers)
            if not begun:
                check_resumed(state, self.schedule, self.epochs, self._cut())
        found = state if begun else None
        processes.run_on_rank0(lambda: settle_changes(run, self.rows, found, self.schedule, self.epochs))
        if state is None:
            seed_everything(self.recipe.seed + self.rank, self.device)
            return None
        self._load(state)
        if begun and self.rank == 0 and self.position.update == 0:
            self._keep_best()  # a kill may have come between the checkpoint and this
        return state

    def _cut(self) -> dict[str, Any]:
        """What says which images an update holds."""
        names = ("images_per_update", "updates_per_epoch")
        return {**{name: getattr(self, name) for name in names}, "seed": self.recipe.seed}

    def _load(self, state: dict[str, Any]) -> None:
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
            seed = to_seed(seed_words(self.recipe.seed, begun.epoch, begun.update, self.rank))
            seed_everything(seed, self.device)
        self._compare(begun)

    def _compare(self, begun: TrainState) -> None:
        """Whether the updates go on as they were cut until now; they hold the same images in any case."""
        here = {"processes": self.ranks, **{name: getattr(self.recipe, name) for name in PASSES}}
        there = {name: getattr(begun, name) for name in here}
        changes = [f"{name} {there[name]!r} -> {here[name]!r}" for name in here if here[name] != there[name]]
        if not changes:
            self.batch_sizes |= begun.batch_sizes  # as they were measured then
        elif self.rank == 0:
            text = f"this training goes on with {', '.join(changes)}: correct, but not to the same bits"
            notify_once(("another cut", self.out, *changes), text)
        self.news = what_changes(begun, self.recipe, self.images_per_update, self.epochs)

    def _announce(self, state: dict[str, Any] | None) -> None:
        model, recipe = self.description["model"], self.recipe
        self.log.print(
            f"{model}: {params(self.step.model) / 1e6:.2f} M parameters, {self.description['num_classes']} classes"
        )
        self.log.print(
            f"{self.data.train_images} images, {self.images_per_update} an update, {self.updates_per_epoch} updates an "
            f"epoch, {self.epochs} epochs; learning rate {recipe.learning_rate(self.images_per_update):.3g}"
        )
        self.log.print(self.cost.table())
        if self.news:
            self.log.print(self.news)
        if state is not None and self.position.epoch < self.epochs:
            self.log.print(f"continuing in epoch {self.position.epoch}, after {self.position.update} updates of it")

    def _warm_up(self) -> None:
        """Compile and tune for every grid and batch now, so that no phase and no validation waits for it."""
        if self.position.epoch == self.epochs or not (self.recipe.torchcompile or self.device.type == "cuda"):
            return
        self.retokenizer.warmup(
            lambda reduction: torch.zeros(self.batch_sizes[reduction], *self.image, device=self.device),
            autocast=self.step.forward_context,
            evaluate=False,
        )
        if not self.data.has_validation:
            return
        for epoch in self.schedule.starts:
            self.retokenizer.step(epoch)
            for size in self.data.eval_batch_sizes(self.recipe.batch_size):
                images = torch.zeros(size, *self.image, device=self.device)  # [B, 3, H, W]
                targets = torch.zeros(size, dtype=torch.int64, device=self.device)  # [B]
                for model in (self.step.model, *self.step.averages):
                    self._evaluate(model, [(images, targets)])

    def _train_epoch(self, run: RunDirectory) -> None:
        """The updates of this epoch that are left."""
        position, per_rank = self.position, self.images_per_update // self.ranks
        if self.retokenizer.step(position.epoch) and position.epoch:
            self.log.print(f"epoch {position.epoch}: {tokens(self.retokenizer.reduction)} from here on")
        self.reduction = self.retokenizer.reduction
        size = self.batch_sizes[self.reduction]
        batches = self.interruption.in_step(self.data.train_batches(position.epoch, position.update * per_rank, size))
        self.step.replica.train()
        started = time.perf_counter() - position.seconds
        while position.update < self.updates_per_epoch:
            update = position.epoch * self.updates_per_epoch + position.update
            self.scheduler.step_update(update)
            loss = self._update(run, batches, per_rank // size, update)  # []
            self.guard.watch(loss.isfinite(), update)
            position.update += 1
            position.loss_sum = position.loss_sum + loss.double()
            last = position.update == self.updates_per_epoch
            report = last or position.update % self.recipe.log_interval == 0
            save = bool(self.recipe.checkpoint_interval) and position.update % self.recipe.checkpoint_interval == 0
            if report or self.device.type == "cpu":  # on a GPU, looking means waiting
                self._check()
            self._report(update, loss, report or self.device.type == "cpu")
            position.seconds = time.perf_counter() - started
            if save and not last:
                self._save(run)
                started = time.perf_counter() - position.seconds

    def _update(self, run: RunDirectory, batches: Batches, passes: int, update: int) -> Tensor:
        """One update; where it cannot have its images, all before it is kept and the training ends."""
        before = random_state(self.device)
        buffers = [(b, b.clone()) for b in self.step.model.buffers()] if passes > 1 else []  # such as BatchNorm's
        try:
            return self.step(batches, passes, update)
        except (Terminated, Unreadable) as reason:
            set_random_state(before, self.device)
            for buffer, value in buffers:
                buffer.copy_(value)
            self._keep(run, reason)
            raise

    def _check(self) -> None:
        bad = self.guard.first()
        if bad is None:
            return
        epoch, update = divmod(bad, self.updates_per_epoch)
        kept = None if self.out is None else self.out / LAST
        good = f"the last good checkpoint is {kept}" if kept and kept.exists() else "no checkpoint has been written yet"
        raise InputError(
            f"the loss or the weights are not finite since update {update} of epoch {epoch} (update {bad} of the "
            f"training); {good}; train again with a lower lr ({self.step.optimizer.param_groups[0]['lr']:.3g} here), "
            "clip_grad, or without amp"
        )

    def _check_weights(self) -> None:
        """The loss says nothing yet of weights that the last update has spoilt; every rank asks before it keeps any."""
        done = self.position.epoch * self.updates_per_epoch + self.position.update
        self.guard.watch(weights_are_finite(self.step.model), max(done - 1, 0))
        self._check()

    def _report(self, update: int, loss: Tensor, read: bool) -> None:
        norm = self.step.grad_norm
        self.log.update(
            update,
            loss.item() if read else None,
            self.step.optimizer.param_groups[0]["lr"],
            self.reduction,
            grad_norm=norm.item() if read and norm is not None else None,
            data_seconds=self.step.data_seconds,
            terms=self.step.regularization.terms if read and self.step.regularization else None,
        )

    def _end_epoch(self, run: RunDirectory) -> None:
        """Validate, write the row of the epoch and the checkpoint after it."""
        position = self.position
        row = {
            "epoch": position.epoch,
            "token_reduction": self.reduction,
            "train_loss": self._mean(position.loss_sum / self.updates_per_epoch),
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "train_seconds": position.seconds,
            "images_per_second": self.updates_per_epoch * self.images_per_update / max(position.seconds, 1e-9),
        }
        self._check_weights()
        started = time.perf_counter()
        if self.data.has_validation and self._validates(position.epoch):
            try:
                row |= self._validate()
            except (Terminated, Unreadable) as reason:
                self._keep(run, reason)
                raise
        row["seconds"] = position.seconds + time.perf_counter() - started
        self.rows.append(row)
        self.position = TrainPosition(position.epoch + 1)
        state = self._state()
        if self.rank == 0:
            run.record(row, state)
            run.state = None
            self._keep_best()
            self.log.epoch(row)
            self.log.write_summary(self.rows)

    def _validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.recipe.eval_interval == 0 or epoch + 1 == self.epochs

    def _validate(self) -> dict[str, float]:
        """On the grid of this phase: the network has seen no other yet."""
        found = self._evaluate(self.step.model, self.data.eval_batches(self.recipe.batch_size))
        row = {"top1": found.top1, "top5": found.top5, "eval_loss": found.loss}
        for model in self.step.averages:
            found = self._evaluate(model, self.data.eval_batches(self.recipe.batch_size))
            row |= {"ema_top1": found.top1, "ema_top5": found.top5, "ema_loss": found.loss}
        return row

    def _evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        images = self.interruption.until_stopped(batches)
        try:
            found = evaluate(model, images, self.device, autocast=self.step.autocast, ranks=self.ranks)
        except InputError:  # there are no images, on any rank: perhaps because all were stopped
            self.interruption.raise_if_stopped()
            raise
        self.interruption.raise_if_stopped()
        return found

    def _mean(self, value: Tensor) -> float:
        """Over the ranks."""
        value = value.to(self.device, copy=True)  # []
        if self.ranks > 1:
            dist.all_reduce(value)
        return value.item() / self.ranks

    # ------------------------------------------------------------------ keeping

    def _keep(self, run: RunDirectory, reason: BaseException) -> None:
        """The state before a training ends early."""
        self._save(run)
        if isinstance(reason, Terminated) and self.out is not None:
            self.log.print(
                f"terminated in epoch {self.position.epoch}, after {self.position.update} updates of it; "
                f"{self.out / LAST} holds them, the same command continues"
            )

    def _save(self, run: RunDirectory) -> None:
        self._check_weights()
        state = self._state()
        if self.rank == 0:
            run.save(state)
            run.state = None  # it is large

    def _keep_best(self) -> None:
        """After an epoch that was the best so far, its checkpoint."""
        if self.out is not None and self.rows and best_row(self.rows) is self.rows[-1]:
            link_or_copy(self.out / LAST, self.out / BEST)

    def _state(self) -> dict[str, Any]:
        """A checkpoint in timm's format, and under ``STATE_KEY`` what it takes to go on to the same bits."""
        if self.out is None:
            return {}
        prepared = {name: getattr(self.recipe, name) for name in ("crop_pct", "crop_mode", "interpolation")}
        arguments = {**self.description, **prepared, "label_names": self.data.class_names}
        state = collect(self.step, self.description["model"], arguments, self.position.epoch - 1)
        best = best_row(self.rows)
        if best is not None:
            state["metric"] = metric(best)
        ranks = processes.gather((self.position.loss_sum.item(), random_state(self.device)))
        begun = TrainState(
            epoch=self.position.epoch,
            update=self.position.update,
            seconds=self.position.seconds,
            losses=[loss for loss, _ in ranks],
            random=[random for _, random in ranks],
            token_reduction=self.reduction,
            batch_sizes=self.batch_sizes,
            epochs=self.epochs,
            schedule=str(self.schedule),
            workers=self.recipe.workers,
            **self._cut(),
            **{name: getattr(self.recipe, name) for name in PASSES},
        )
        state[STATE_KEY] = begun.to_dict()
        return state

    @property
    def result(self) -> TrainResult:
        """What the training has come to so far."""
        average = next(iter(self.step.averages), None)
        return TrainResult(self.step.model, average, self.rows, self.schedule, self.cost, self.out)

    def _summary(self) -> dict[str, Any]:
        result = self.result
        return {
            "model": self.description["model"],
            "epochs": self.epochs,
            "top1": result.top1,
            "best": result.best,
            "train_seconds": result.seconds,
            "saving": self.cost.saving,
        }
