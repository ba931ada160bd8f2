"""What of a training survives a kill: its position, and all that its step holds, in timm's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .checkpoint import FORMAT, one_line
from .parallel import load_model, load_optimizer, whole
from .step import Step


@dataclass
class Position:
    """Where a training stands: after ``update`` updates of epoch ``epoch``."""

    epoch: int = 0
    update: int = 0
    loss_sum: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # []
    seconds: float = 0.0  # in the updates of this epoch, over interruptions


def collect(step: Step, name: str, arguments: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """A checkpoint in timm's format after ``epoch``, the last finished one; every rank must call it."""
    state = {
        "epoch": epoch,
        "arch": name,
        "version": FORMAT,
        "args": dict(arguments),
        "state_dict": whole(step.model.state_dict()),
        "optimizer": whole(step.optimizer.state_dict()),
    }
    for average in step.averages:
        state["state_dict_ema"] = whole(average.state_dict())
    if step.scaler.is_enabled():
        state["amp_scaler"] = step.scaler.state_dict()
    return state


def restore(step: Step, state: Mapping[str, Any]) -> None:
    """The weights, average, optimizer and loss scale of a checkpoint; an average that it lacks starts from the weights.

    Raises:
        InputError: it is of another network, or of an optimizer with other groups of weights.
    """
    try:
        load_model(step.model, state["state_dict"])
        for average in step.averages:
            load_model(average, state.get("state_dict_ema", state["state_dict"]))
        if "optimizer" in state:
            load_optimizer(step.optimizer, state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"the checkpoint is of another network or optimizer: {one_line(error)}; give the options that it was begun "
            "with, or take its weights alone as initial_checkpoint"
        ) from error
    if step.scaler.is_enabled() and "amp_scaler" in state:
        step.scaler.load_state_dict(state["amp_scaler"])
