"""One update of the weights: Mixup, forward and backward passes, clipping, optimizer, moving average; and what timm
makes of a recipe for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import processes
from ..errors import InputError
from ..recipe import Recipe, TrainingRecipe
from .parallel import full_tensor, gradient_sync, replicate, shard
from .regularizers import Regularization, parse_regularizers

Batches = Iterator[tuple[Tensor, Tensor]]
# of torch, in one pass over memory: with coarse tokens the optimizer is a large part of an update
FUSED = ("adam", "adamw")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")  # of timm, those that need no metric
GRAPHS = 32  # of one network: three grids, training and validation, whole and last batches, and room
NEVER = 2**62  # an update that no training reaches


class Step:
    """One update from the next batches; all that it changes is here.

    Args:
        model: a prepared network, which holds the weights; ``replica`` is what runs (it, or DistributedDataParallel
            around it).
        recipe: optimizer, losses, average.
        device: where it computes.
        num_classes: for mixed targets.
        images_per_update: over all ranks, for the learning rate.

    Attributes:
        averages: the average of the weights, if there is one.
        grad_norm: [] of the last update, where gradients are clipped.
        data_seconds: how long the last update waited for images.
    """

    def __init__(
        self, model: nn.Module, recipe: Any, device: torch.device, num_classes: int, images_per_update: int
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.ema = None
        if recipe.model_ema:
            self.ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
        self.averages: list[nn.Module] = [] if self.ema is None else [self.ema.module]
        networks = [model, *self.averages]
        if recipe.parallel == "fsdp" and processes.is_distributed():
            for network in networks:
                shard(network, device)
        self.optimizer = self._make_optimizer(images_per_update)
        if recipe.torchcompile:
            for network in networks:
                self._compile(network)
        self.replica = replicate(model, device)
        # float16 alone needs its gradients scaled
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")
        self.grad_norm: Tensor | None = None
        self.data_seconds = 0.0
        self._set_up_loss(num_classes)

    def __call__(self, batches: Batches, passes: int, update: int) -> Tensor:
        """The mean loss [] of ``passes`` batches, detached; ``update`` counts from 0 over the whole training."""
        self.optimizer.zero_grad(set_to_none=True)
        self.data_seconds = 0.0
        total = torch.zeros((), device=self.device)
        for index in range(passes):
            images, targets = self._next(batches)  # [B, 3, H, W], [B] or [B, classes]
            with gradient_sync(self.replica, enabled=index == passes - 1):
                loss = self._loss(images, targets) / passes
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=update + 1)
        return total

    @property
    def lr(self) -> float:
        """Learning rate of the next update, or of the last one."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def terms(self) -> dict[str, float] | None:
        """Parts of the last loss by name, where it has some."""
        return self.regularization.terms if self.regularization else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.recipe, self.device)

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """The context of a training pass."""
        with self.autocast(), self.regularization or contextlib.nullcontext():
            yield

    def _make_optimizer(self, images_per_update: int) -> torch.optim.Optimizer:
        return make_optimizer(self.recipe, self.model, images_per_update)

    def _set_up_loss(self, num_classes: int) -> None:
        recipe = self.recipe
        self.criterion = make_criterion(recipe).to(self.device)
        self.mixup = make_mixup(recipe, num_classes)
        terms = parse_regularizers(recipe.regularizers)
        self.regularization = Regularization(self.model, terms) if terms else None

    def _compile(self, network: nn.Module) -> None:
        network.compile(dynamic=False)  # one graph for each grid and batch

    def _next(self, batches: Batches) -> tuple[Tensor, Tensor]:
        images, targets = self._wait(batches)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _wait(self, batches: Iterator[Any]) -> Any:
        started = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - started
        return batch

    def _loss(self, images: Any, targets: Any) -> Tensor:
        with self.forward_context():
            loss = self.criterion(self.replica(images), targets)
        return loss if self.regularization is None else loss + self.regularization.loss()

    def _clip(self) -> None:
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)  # []
            self.grad_norm = full_tensor(norm)  # of shards: all ranks ask


def prepare(model: nn.Module, recipe: TrainingRecipe, device: torch.device) -> None:
    """Put the network on its device, and let it keep what the recipe wants for its backward pass."""
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise InputError(f"{type(model).__name__} has no set_grad_checkpointing; leave grad_checkpointing out")
        model.set_grad_checkpointing(True)  # type: ignore[operator]


def raised_recompile_limit(recipe: TrainingRecipe) -> contextlib.AbstractContextManager[Any]:
    """Inside it a compiled network may have ``GRAPHS`` graphs; torch's own limit is for all networks of a program."""
    if not recipe.torchcompile:
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, GRAPHS))


def autocast(recipe: TrainingRecipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not recipe.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, recipe.amp_dtype))


def make_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not recipe.mixes:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def make_criterion(recipe: Recipe) -> nn.Module:
    """timm's choice: Mixup's targets are soft and smoothed already."""
    if recipe.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0 if recipe.mixes else recipe.smoothing)
    if recipe.mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()


def make_optimizer(
    recipe: TrainingRecipe, model: nn.Module, images_per_update: int, filter_norms: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of all weights; norms, biases and what the network names do not decay with ``filter_norms``.

    Raises InputError for an optimizer that timm does not know.
    """
    options: Any = {"fused": True} if recipe.opt.lower() in FUSED else {}
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.learning_rate(images_per_update),
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            filter_bias_and_bn=filter_norms,
            **options,
        )
    except (AssertionError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"opt {recipe.opt!r} cannot be used: {error}; see timm.optim.list_optimizers()") from error


def make_scheduler(
    recipe: TrainingRecipe, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int
) -> Scheduler:
    """The learning rate of every update is a function of its number: nothing of this needs a checkpoint.

    Raises InputError for one that timm does not know, or that follows a metric.
    """
    if recipe.sched not in SCHEDULES:
        raise InputError(f"sched must be one of {', '.join(SCHEDULES)}; got {recipe.sched!r}")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=epochs,
        warmup_epochs=min(recipe.warmup_epochs, epochs // 5),
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def learning_rate(
    recipe: TrainingRecipe, images_per_update: int, epochs: int, updates_per_epoch: int, update: int
) -> float:
    """The learning rate of one update of a training of so many epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate(images_per_update))
    make_scheduler(recipe, optimizer, epochs, updates_per_epoch).step_update(update)
    return optimizer.param_groups[0]["lr"]


class Diverged(InputError):
    """The loss or the weights are not finite."""


class FiniteGuard:
    """Remembers the first update after which something was not finite, without waiting for the device.

    Args:
        step: what is watched.
        updates_per_epoch: for the message.
        checkpoint: the last good one, if there is one.
    """

    def __init__(self, step: Step, updates_per_epoch: int, checkpoint: Path | None) -> None:
        self.step, self.updates_per_epoch, self.checkpoint = step, updates_per_epoch, checkpoint
        self.first = torch.full((), NEVER, dtype=torch.int64, device=step.device)  # []

    def watch(self, finite: Tensor, update: int) -> None:
        """Note whether all was well after ``update``: [] of bool."""
        self.first = torch.where(finite, self.first, self.first.clamp(max=update))

    def check(self) -> None:
        """Raise Diverged if anything was not finite, on any rank; every rank must call it."""
        if processes.is_distributed():
            dist.all_reduce(self.first, op=dist.ReduceOp.MIN)
        update = int(self.first)
        if update == NEVER:
            return
        kept = self.checkpoint if self.checkpoint is not None and self.checkpoint.exists() else None
        good = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written yet"
        raise Diverged(
            f"the loss or the weights are not finite since update {update % self.updates_per_epoch} of epoch "
            f"{update // self.updates_per_epoch} (update {update} of the training); {good}; train again with a lower "
            f"lr ({self.step.lr:.3g} here), clip_grad, or without amp"
        )

    def check_weights(self, update: int) -> None:
        """Check the weights before any are kept: ``update`` may have spoilt them though its loss was fine."""
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.step.model.parameters())  # of this rank
        self.watch(torch.stack([part.detach().isfinite().all() for part in parts]).all(), update)
        self.check()
