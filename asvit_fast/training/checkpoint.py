"""Checkpoints in timm's format, and in an entry of our own all that a training needs to go on to the same bits."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import InputError, one_line
from ..files import checksums_fit, file_errors
from ..recipe import are_numbers
from .fields import TEXT, Field, fits, is_list, is_positive, shown, whole
from .parallel import full_state, load_model, load_optimizer
from .step import Step

LAST, BEST = "last.pth.tar", "model_best.pth.tar"
STATE_KEY = "asvit_fast"  # the entry that timm does not have: position, random states
WEIGHTS = ("state_dict", "model")  # keys of weights: timm's; of other training codes
AVERAGES = ("state_dict_ema", "model_ema")
FORMAT = 2  # timm's: "epoch" is the last finished one


# --------------------------------------------------------------------------- our own entry


@dataclass
class TrainPosition:
    """The place in a training: after ``update`` updates of epoch ``epoch``, whose losses on this rank it adds up."""

    epoch: int = 0
    update: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # []
    seconds: float = 0.0  # in the updates of this epoch, over interruptions


_MAY_BE_ZERO = ("epoch", "update", "seed", "workers")
_TYPES: dict[str, Field] = {  # by annotation
    "float": (lambda value: are_numbers([value]) and value >= 0, "seconds"),
    "str": TEXT,
    "list[float]": (are_numbers, "a finite number for each rank"),
    "list[dict[str, Any]]": (
        lambda value: is_list(value, lambda state: isinstance(state, dict)),
        "states of each rank",
    ),
    "dict[int, int]": (
        lambda value: isinstance(value, dict) and all(map(is_positive, (*value, *value.values()))),
        "images of a pass by token reduction",
    ),
}


@dataclass(frozen=True)
class TrainState:
    """Our entry of a checkpoint, checked: how the training ran until then, and with which options.

    ``losses`` and ``random`` have an entry for each rank: its sum of losses in the epoch, its generators.
    ``batch_sizes`` are images of a pass, by token reduction.
    """

    epoch: int
    update: int
    seconds: float
    losses: list[float]
    random: list[dict[str, Any]]
    token_reduction: int
    batch_sizes: dict[int, int]
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
        for one in fields(self):
            expected = _TYPES.get(str(one.type)) or whole(0 if one.name in _MAY_BE_ZERO else 1)
            _check(one.name, getattr(self, one.name), expected)
        ranks = len(self.losses)
        _check("random", self.random, (lambda states: len(states) == ranks, f"{ranks} states"))
        _check("update", self.update, (lambda update: update <= self.updates_per_epoch, "an update of the epoch"))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> TrainState | None:
        """The entry of a checkpoint; None where another program wrote it. Raises InputError for one that cannot be."""
        entry = state.get(STATE_KEY)
        if entry is None:
            return None
        table: Field = (lambda value: isinstance(value, Mapping), "a table of fields")
        _check("itself", entry, table)
        _check("position", entry.get("position"), table)
        values: dict[str, Any] = {**entry, **entry["position"]}
        return cls(**{one.name: values.get(one.name) for one in fields(cls)})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The entry that ``of`` reads."""
        entry = {one.name: getattr(self, one.name) for one in fields(self)}
        return {"position": {name: entry.pop(name) for name in ("epoch", "update", "seconds")}, **entry}

    @property
    def processes(self) -> int:
        return len(self.losses)

    def position(self, rank: int, ranks: int) -> TrainPosition:
        """The place where ``ranks`` processes go on. Another number of them shares what all lost so far, whose mean
        over the ranks is then what it was."""
        loss = self.losses[rank] if ranks == self.processes else math.fsum(self.losses) / self.processes
        return TrainPosition(self.epoch, self.update, torch.tensor(loss, dtype=torch.float64), self.seconds)


def _check(name: str, value: Any, expected: Field) -> None:
    if not fits(value, expected):
        raise InputError(
            f"the checkpoint is damaged, or of another version: {STATE_KEY}.{name} must be {expected[1]}, got "
            f"{shown(value)}; train again, or take its weights alone as initial_checkpoint"
        )


# --------------------------------------------------------------------------- a training's part in timm's format


def collect(step: Step, name: str, arguments: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """A checkpoint in timm's format after ``epoch``, the last finished one; every rank must call it."""
    state = {
        "epoch": epoch,
        "arch": name,
        "version": FORMAT,
        "args": dict(arguments),
        "state_dict": full_state(step.model.state_dict()),
        "optimizer": full_state(step.optimizer.state_dict()),
    }
    for average in step.averages:
        state["state_dict_ema"] = full_state(average.state_dict())
    if step.scaler.is_enabled():
        state["amp_scaler"] = step.scaler.state_dict()
    return state


def restore(step: Step, state: Mapping[str, Any]) -> None:
    """Load the weights, average, optimizer and loss scale of a checkpoint; an average that it lacks starts from the
    weights.

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


# --------------------------------------------------------------------------- files


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a .pth.tar, .pth or .safetensors file onto the CPU; no code of the file is run.

    Raises:
        InputError: no such file, or one that is not such a file or would run code.
    """
    path = Path(path)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {str(path)!r} {reason}; give a file of asvit-fast train or of timm")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its options in one
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and STATE_KEY in content and not checksums_fit(path):
            raise ValueError("checksums do not fit")
    except Exception as error:  # anything: pickle, zip and torch each have their own
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be read
            raise
        raise InputError(
            f"{str(path)!r} is not a checkpoint that can be loaded safely: it is damaged, or no checkpoint, or holds "
            "objects other than tensors, numbers and text"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds {type(content).__name__}, not a checkpoint; save a state_dict")
    return content


def read_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint of a training, with plain names of its weights. Raises InputError as the functions it calls."""
    content = read_file(path)
    return {**content, "state_dict": weights_of(content, path)}


def last_epoch(content: Mapping[str, Any]) -> int:
    """The last finished epoch of a checkpoint, -1 where it says none. Raises InputError for what is not an epoch."""
    epoch = content.get("epoch", -1)
    if type(epoch) is not int or epoch < -1:
        raise InputError(f"the checkpoint is damaged: epoch must be a whole number from 0, got {epoch!r}")
    return epoch


def weights_of(content: dict[str, Any], path: str | os.PathLike[str], use_ema: bool = False) -> dict[str, Any]:
    """The state_dict in what ``read_file`` gave, or its moving average. Raises InputError when there is none."""
    for key in AVERAGES if use_ema else WEIGHTS:
        if isinstance(content.get(key), Mapping):
            if not _are_weights(content[key]):
                raise InputError(f"{str(path)!r}: {key} must hold tensors by their names; give another checkpoint")
            return clean_state_dict(dict(content[key]))
    if use_ema:
        raise InputError(f"{str(path)!r} holds no moving average of the weights; leave out use_ema")
    if _are_weights(content):
        return clean_state_dict(content)
    raise InputError(f"{str(path)!r} holds no weights ({', '.join(map(str, list(content)[:5]))}); give a checkpoint")


def _are_weights(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that will be replaced, never changed, another name: no copy where the system has hard links."""
    scratch = target.with_name(f".{target.name}.tmp")
    with file_errors("write", target):
        scratch.unlink(missing_ok=True)
        try:
            try:
                os.link(source, scratch)
            except OSError:  # a file system without links
                shutil.copyfile(source, scratch)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)  # it also stays where both were names of one file already
