"""One update of the weights: Mixup, forward and backward passes, clipping, optimizer, moving average."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import processes
from ..errors import InputError
from ..recipe import Recipe
from .optimization import make_optimizer
from .parallel import gradient_sync, replicate, shard
from .regularizers import Regularization, parse_regularizers

Batches = Iterator[tuple[Tensor, Tensor]]
GRAPHS = 32  # of one network: three grids, training and validation, whole and last batches, and room
NEVER = 2**62  # an update that no training reaches


@dataclass
class Step:
    """Callable: one update from the next batches; all that it changes is here.

    ``replica`` is what runs (the network, or DistributedDataParallel around it), ``model`` holds the weights.
    """

    replica: nn.Module
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    criterion: nn.Module
    mixup: Mixup | None
    regularization: Regularization | None
    recipe: Recipe
    device: torch.device
    grad_norm: Tensor | None = None  # of the last update, where gradients are clipped
    data_seconds: float = 0.0  # that the last update waited for images

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
    def averages(self) -> list[nn.Module]:
        """The average of the weights, if there is one."""
        return [] if self.ema is None else [self.ema.module]

    @property
    def lr(self) -> float:
        """Learning rate of the next update, or of the last one."""
        return self.optimizer.param_groups[0]["lr"]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.recipe, self.device)

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """What a training pass runs in."""
        with self.autocast(), self.regularization or contextlib.nullcontext():
            yield

    def _next(self, batches: Batches) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        images, targets = next(batches)
        self.data_seconds += time.perf_counter() - started
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with self.forward_context():
            loss = self.criterion(self.replica(images), targets)
        return loss if self.regularization is None else loss + self.regularization.loss()

    def _clip(self) -> None:
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)  # []
            self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of shards: all ranks ask


def prepare(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Where the network lives and how it keeps what its backward pass needs."""
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise InputError(f"{type(model).__name__} has no set_grad_checkpointing; leave grad_checkpointing out")
        model.set_grad_checkpointing(True)  # type: ignore[operator]


def make_step(model: nn.Module, recipe: Recipe, device: torch.device, num_classes: int, images_per_update: int) -> Step:
    """The step of a prepared network: its average, its shards or replicas, its optimizer."""
    terms = parse_regularizers(recipe.regularizers)
    ema = None
    if recipe.model_ema:
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    networks = [model] if ema is None else [model, ema.module]
    if recipe.parallel == "fsdp" and processes.is_distributed():
        for network in networks:
            shard(network, device)
    optimizer = make_optimizer(recipe, model, images_per_update)
    if recipe.torchcompile:
        for network in networks:
            network.compile(dynamic=False)  # one graph for each grid and batch
    return Step(
        replica=replicate(model, device),
        model=model,
        ema=ema,
        optimizer=optimizer,
        scaler=make_scaler(recipe, device),
        criterion=make_criterion(recipe).to(device),
        mixup=make_mixup(recipe, num_classes),
        regularization=Regularization(model, terms) if terms else None,
        recipe=recipe,
        device=device,
    )


def raised_recompile_limit(recipe: Recipe) -> contextlib.AbstractContextManager[Any]:
    """Inside it a compiled network may have ``GRAPHS`` graphs; torch's own limit is for all networks of a program."""
    if not recipe.torchcompile:
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(recompile_limit=max(torch._dynamo.config.recompile_limit, GRAPHS))


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not recipe.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, recipe.amp_dtype))


def make_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler:
    """float16 alone needs its gradients scaled; for the rest it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=recipe.amp and recipe.amp_dtype == "float16")


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
        """Raise InputError if anything was not finite, on any rank; every rank must call it."""
        if processes.is_distributed():
            dist.all_reduce(self.first, op=dist.ReduceOp.MIN)
        update = int(self.first)
        if update == NEVER:
            return
        kept = self.checkpoint if self.checkpoint is not None and self.checkpoint.exists() else None
        good = f"the last good checkpoint is {kept}" if kept else "no checkpoint has been written yet"
        raise InputError(
            f"the loss or the weights are not finite since update {update % self.updates_per_epoch} of epoch "
            f"{update // self.updates_per_epoch} (update {update} of the training); {good}; train again with a lower "
            f"lr ({self.step.lr:.3g} here), clip_grad, or without amp"
        )

    def check_weights(self, update: int) -> None:
        """The same of the weights, which ``update`` may have spoilt though its loss was fine; before any are kept."""
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in self.step.model.parameters())  # of this rank
        self.watch(torch.stack([part.detach().isfinite().all() for part in parts]).all(), update)
        self.check()
