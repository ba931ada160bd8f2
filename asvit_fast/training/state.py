"""What of a training survives a kill: its position, and all that its step holds, in timm's format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .checkpoint import FORMAT, STATE_KEY, one_line
from .parallel import load_model, load_optimizer, whole
from .step import Step


@dataclass
class TrainPosition:
    """Where a training stands: after ``update`` updates of epoch ``epoch``, whose losses on this rank it adds up."""

    epoch: int = 0
    update: int = 0
    loss_sum: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # []
    seconds: float = 0.0  # in the updates of this epoch, over interruptions


@dataclass(frozen=True)
class TrainState:
    """How a training ran until its checkpoint, and with which options: our entry of it, checked.

    ``losses`` and ``random`` have an entry for each rank: its sum of losses in the epoch, its generators.
    """

    epoch: int
    update: int
    seconds: float
    losses: list[float]
    random: list[dict[str, Any]]
    token_reduction: int
    batch_sizes: dict[int, int]  # images of a pass, by token reduction
    epochs: int
    schedule: str
    images_per_update: int
    updates_per_epoch: int
    seed: int
    workers: int
    batch_size: int
    grad_accum_steps: int
    phase_batch_sizes: str

    def __post_init__(self) -> None:
        """Raises InputError, naming the first field that cannot be."""
        for field in dataclasses.fields(self):
            holds, expected = _FIELDS[field.name]
            _check(field.name, getattr(self, field.name), holds, expected)
        _check("random", self.random, lambda states: len(states) == len(self.losses), f"{len(self.losses)} states")
        _check("update", self.update, lambda update: update <= self.updates_per_epoch, "an update of the epoch")

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> TrainState | None:
        """Of a checkpoint; None where another program wrote it. Raises InputError for an entry that cannot be."""
        entry = state.get(STATE_KEY)
        if entry is None:
            return None
        _check("itself", entry, lambda entry: isinstance(entry, Mapping), "a table of fields")
        position = entry.get("position")
        _check("position", position, lambda entry: isinstance(entry, Mapping), "a table of fields")
        content = {**entry, **position}
        return cls(**{field.name: content.get(field.name) for field in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The entry that ``of`` reads."""
        entry = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"position": {name: entry.pop(name) for name in ("epoch", "update", "seconds")}, **entry}

    @property
    def processes(self) -> int:
        return len(self.losses)

    def position(self, rank: int, ranks: int) -> TrainPosition:
        """Where ``ranks`` processes go on. Another number of them shares what all have lost so far, whose mean over the
        ranks is then what it was."""
        loss = self.losses[rank] if ranks == self.processes else math.fsum(self.losses) / self.processes
        return TrainPosition(self.epoch, self.update, torch.tensor(loss, dtype=torch.float64), self.seconds)


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and value >= least, f"a whole number of at least {least}"


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seconds": (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "seconds"),
    "losses": (lambda value: _list_of(value, float) and math.isfinite(sum(value)), "a finite number for each rank"),
    "random": (lambda value: _list_of(value, dict), "the generators of each rank"),
    "batch_sizes": (
        lambda value: isinstance(value, dict) and all(type(n) is int and n >= 1 for n in (*value, *value.values())),
        "images of a pass by token reduction",
    ),
    **dict.fromkeys(("epoch", "update", "seed", "workers"), _whole(0)),
    **dict.fromkeys(
        ("token_reduction", "epochs", "images_per_update", "updates_per_epoch", "batch_size", "grad_accum_steps"),
        _whole(1),
    ),
    **dict.fromkeys(("schedule", "phase_batch_sizes"), (lambda value: isinstance(value, str), "text")),
}


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is kind for item in value)


def _check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    if not holds(value):
        found = repr(value) if len(repr(value)) <= 60 else type(value).__name__
        raise InputError(
            f"the checkpoint is damaged, or of another version: {STATE_KEY}.{name} must be {expected}, got {found}; train "
            "again, or take its weights alone as initial_checkpoint"
        )


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
        if step.scaler.is_enabled() and "amp_scaler" in state:
            step.scaler.load_state_dict(state["amp_scaler"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"the checkpoint is of another network or optimizer: {one_line(error)}; give the options that it was begun "
            "with, or take its weights alone as initial_checkpoint"
        ) from error
