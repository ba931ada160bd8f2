"""Optimizer and learning rate of a recipe, by timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..errors import InputError
from ..recipe import Recipe

# of torch, in one pass over memory: with coarse tokens the optimizer is a large part of an update
FUSED = ("adam", "adamw")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")  # of timm, those that need no metric


def make_optimizer(recipe: Recipe, model: nn.Module, images_per_update: int) -> torch.optim.Optimizer:
    """Raises InputError for an optimizer that timm does not know."""
    options: Any = {"fused": True} if recipe.opt.lower() in FUSED else {}
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.learning_rate(images_per_update),
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            **options,
        )
    except (AssertionError, ValueError, TypeError, ImportError) as error:
        raise InputError(f"opt {recipe.opt!r} cannot be used: {error}; see timm.optim.list_optimizers()") from error


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int) -> Scheduler:
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


def learning_rate(recipe: Recipe, images_per_update: int, epochs: int, updates_per_epoch: int, update: int) -> float:
    """Of one update of a training of so many epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate(images_per_update))
    make_scheduler(recipe, optimizer, epochs, updates_per_epoch).step_update(update)
    return optimizer.param_groups[0]["lr"]
