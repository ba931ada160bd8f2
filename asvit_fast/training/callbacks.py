"""Whoever follows a training: TensorBoard, Weights & Biases, MLflow, and callbacks of one's own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError
from ..files import read_object, to_json, write_atomic

EVENTS, RUNS = "tensorboard", "trackers.json"  # in a run directory: events, and the names that trackers gave the run
PROJECT = "asvit_fast"  # where WANDB_PROJECT names none


@dataclass(frozen=True)
class TrainingInfo:
    """The training that a callback follows.

    Attributes:
        config: options of the run, as in config.json.
        model: the network that is trained (not its average), on its device.
        directory: run directory, or None.
        epochs, updates_per_epoch: length of the training.
        first_update: updates that earlier runs have done; a killed run may have reported some of those that follow.
        print: says a line above the progress bar.
    """

    config: dict[str, Any]
    model: nn.Module
    directory: Path | None
    epochs: int
    updates_per_epoch: int
    first_update: int
    print: Callable[[str], None]


class Callback:
    """Follows a training: ``af.train(..., callbacks=[Callback()])``. Derive from it and override what you need.

    Rank 0 calls it, the others do not: nothing that all processes must do belongs here. A callback may look at the
    network, and must not change it: the run would no longer be what its options say. An exception ends the training;
    its last checkpoint stays.

    Examples:
        >>> import asvit_fast as af
        >>> class Losses(af.Callback):
        ...     def on_train_begin(self, info):
        ...         self.losses = []
        ...     def on_epoch(self, row, update):
        ...         self.losses.append(row["train_loss"])
    """

    def on_train_begin(self, info: TrainingInfo) -> None:
        """The first update is about to begin, of the training or of what is left of it."""

    def on_update(self, metrics: Mapping[str, float], update: int) -> None:
        """Update number ``update`` has ended, from 0: loss, lr, images_per_second, token_reduction, data_share
        (part of the time spent waiting for images), and grad_norm and loss_NAME where there are such. On a GPU only
        every ``log_interval`` updates."""

    def on_epoch(self, row: Mapping[str, Any], update: int) -> None:
        """An epoch has ended, validation included, with this update: its row of trace.jsonl."""

    def on_train_end(self, summary: Mapping[str, Any]) -> None:
        """The last epoch has ended: model, epochs, top1 (percent), best, train_seconds, saving."""

    def close(self) -> None:
        """Nothing more will come, whatever the reason: the end, an error, SIGTERM."""


class TensorBoard(Callback):
    """Events in the folder tensorboard/ of the run directory; those beyond the first update are dropped."""

    def __init__(self) -> None:
        self._events: Any = None

    def on_train_begin(self, info: TrainingInfo) -> None:
        if info.directory is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            info.print("no events for TensorBoard, which is not installed; pip install 'asvit-fast[train]'")
            return
        self._events = SummaryWriter(str(info.directory / EVENTS), purge_step=info.first_update)

    def on_update(self, metrics: Mapping[str, float], update: int) -> None:
        self._write("train", metrics, update)

    def on_epoch(self, row: Mapping[str, Any], update: int) -> None:
        self._write("epoch", numbers(row), update)
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _write(self, group: str, scalars: Mapping[str, float], update: int) -> None:
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(f"{group}/{name}", value, update)


class WandbTracker(Callback):
    """A run of Weights & Biases, in the project of ``WANDB_PROJECT``; a continued training continues its run.

    ``options`` go to ``wandb.init``. Raises InputError when wandb is not installed, or refuses to begin.
    """

    def __init__(self, **options: Any) -> None:
        _require("wandb")
        self.options = options
        self._run: Any = None

    def on_train_begin(self, info: TrainingInfo) -> None:
        import wandb

        named = {"project": os.environ.get("WANDB_PROJECT", PROJECT), "config": info.config}
        if info.directory is not None:
            identity = _run_name(info.directory, "wandb", lambda: secrets.token_hex(8))
            named |= {"id": identity, "name": info.directory.name, "resume": "allow", "dir": str(info.directory)}
        with _starting("wandb"):
            self._run = wandb.init(**{**named, **self.options})
        self._run.define_metric("*", step_metric="update")  # a step may be reported twice, after a kill

    def on_update(self, metrics: Mapping[str, float], update: int) -> None:
        self._run.log({**{f"train/{name}": value for name, value in metrics.items()}, "update": update})

    def on_epoch(self, row: Mapping[str, Any], update: int) -> None:
        self._run.log({**{f"epoch/{name}": value for name, value in numbers(row).items()}, "update": update})

    def on_train_end(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(numbers(summary))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class MlflowTracker(Callback):
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say; a continued training
    continues its run.

    Raises InputError when mlflow is not installed, or refuses to begin.
    """

    def __init__(self) -> None:
        _require("mlflow")
        self._client: Any = None
        self._run: str = ""

    def on_train_begin(self, info: TrainingInfo) -> None:
        import mlflow

        with _starting("mlflow"):
            self._client = mlflow.MlflowClient()
            experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        name = None if info.directory is None else info.directory.name

        def create() -> str:
            run = self._client.create_run(experiment, run_name=name).info.run_id
            for option, value in _flat(info.config).items():
                self._client.log_param(run, option, value)
            return run

        self._run = create() if info.directory is None else _run_name(info.directory, "mlflow", create)
        self._client.update_run(self._run, status="RUNNING")

    def on_update(self, metrics: Mapping[str, float], update: int) -> None:
        self._log("train", metrics, update)

    def on_epoch(self, row: Mapping[str, Any], update: int) -> None:
        self._log("epoch", numbers(row), update)

    def on_train_end(self, summary: Mapping[str, Any]) -> None:
        self._client.set_terminated(self._run)
        self._client = None

    def close(self) -> None:
        if self._client is not None:  # not at its end
            self._client.set_terminated(self._run, status="KILLED")
            self._client = None

    def _log(self, group: str, scalars: Mapping[str, float], update: int) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._run, f"{group}/{name}", value, step=update)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its epoch, which is no measurement."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "epoch"}


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"log_{package} needs {package}: pip install 'asvit-fast[trackers]'")


@contextlib.contextmanager
def _starting(package: str) -> Iterator[None]:
    """What a tracker refuses before the first update (no key, no server, a store that it cannot use) as InputError."""
    try:
        yield
    except Exception as error:  # each has its own
        reason = " ".join(str(error).split())  # whole: it says how to set it up
        raise InputError(f"log_{package}: {package} cannot begin ({reason}); set it up, or leave it out") from error


def _run_name(directory: Path, tracker: str, create: Callable[[], str]) -> str:
    """The name that a tracker knows this run by, kept in its directory."""
    names = read_object(directory / RUNS)
    if not isinstance(names.get(tracker), str):
        names[tracker] = create()
        write_atomic(directory / RUNS, to_json(names) + "\n")
    return names[tracker]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options with those inside others under names with dots."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
