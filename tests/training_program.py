"""Small trainings, some of which die on the way, for the training tests, in processes of their own.

    training_program.py OUT [--die-at UPDATE] [--stall-at READ] [--options JSON]

Under torchrun or not. ``--die-at`` kills the process with SIGKILL before that update, once in the life of OUT;
``--stall-at`` makes that read of its training images last for ever, once in the life of OUT.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

# before torch is imported: processes share the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asvit_fast import files
from asvit_fast.errors import InputError
from asvit_fast.recipe import Recipe
from asvit_fast.training import TrainResult, train
from asvit_fast.training.data import Reader
from asvit_fast.training.data.loader import MapLoader
from asvit_fast.training.log import TrainingLog
from asvit_fast.training.step import Step

TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
SIZE = 32  # pixels
CLASSES = 4
OPTIONS: dict[str, Any] = {
    "schedule": "1:4,1:2,1:1",
    "epochs": 3,
    "img_size": SIZE,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
    "progress": False,
    "checkpoint_interval": 2,
    "lr": 3e-3,
    "seed": 3,
}
PLAIN: dict[str, Any] = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "reprob": 0.0, "no_aug": True}  # nothing drawn


class Pictures(torch.utils.data.Dataset):
    """Noise around a pattern of each class, in memory."""

    def __init__(self, count: int = 48, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
        self.targets = torch.arange(count) % CLASSES  # [count]
        coarse = patterns[self.targets] + 0.5 * torch.randn(count, 3, 8, 8, generator=generator)
        self.images = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE))  # [count, 3, SIZE, SIZE]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


def write_images(root: Path) -> Path:
    """Image files of noise: 10 of each class to train on, 3 to validate."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)  # [H, W, 3]
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


class Stalling(Pictures):
    """A read that never ends, once: the ``at``-th of this process, while the marker file does not exist."""

    def __init__(self, at: int, marker: Path, *arguments: int) -> None:
        super().__init__(*arguments)
        self.at, self.marker, self.reads = at, marker, 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        if self.reads == self.at and not self.marker.exists():
            self.marker.touch()
            time.sleep(3600)
        return super().__getitem__(index)


def stalling_data(where: str, at: int, marker: Path) -> tuple[Pictures, Pictures]:
    """Data of which reading "training" or "validation" images stalls."""
    return (
        Stalling(at, marker) if where == "training" else Pictures(),
        Stalling(at, marker, 16, 1) if where == "validation" else Pictures(16, seed=1),
    )


def run_stalling(out: str, where: str, at: int, options: dict[str, Any]) -> None:
    """Until SIGTERM or SIGKILL; ``where`` "update" stalls for a second in update ``at``. The marker is OUT.stalls."""
    marker = Path(f"{out}.stalls")
    if where != "update":
        run(out, stalling_data(where, at, marker), **options)
    original = Step._clip

    def clip(self: Step, calls: list[int] = [0]) -> None:  # noqa: B006
        calls[0] += 1
        if calls[0] == at:
            marker.touch()
            time.sleep(1)
        original(self)

    Step._clip = clip  # type: ignore[method-assign]
    run(out, **options)


def run_with_workers(method: str, pids: str) -> None:
    """Data workers of a start method wait for their next request; their numbers go to the file ``pids``."""
    multiprocessing.set_start_method(method, force=True)
    reader = Reader(Recipe.of(workers=2), SIZE, torch.device("cpu"))
    loader = MapLoader(Pictures(), reader, CLASSES, training=False)
    list(loader(epoch=0, start=0, stop=4, batch_size=2))
    workers = [worker.pid for worker in multiprocessing.active_children()]
    files.write_atomic(pids, " ".join(map(str, workers)))
    time.sleep(3600)


def run(out: str | Path | None, data: Any = None, **options: Any) -> TrainResult:
    data = (Pictures(), Pictures(16, seed=1)) if data is None else data
    return train(TOPOLOGY, data, out=out, **{**OPTIONS, **options})


def grad_norms() -> list[float]:
    """Gradient norms of the updates from now on, as they are logged."""
    norms: list[float] = []
    original = TrainingLog.update

    def update(self: TrainingLog, *arguments: Any, grad_norm: float | None = None, **options: Any) -> None:
        norms.extend(() if grad_norm is None else (grad_norm,))
        original(self, *arguments, grad_norm=grad_norm, **options)

    TrainingLog.update = update  # type: ignore[method-assign]
    return norms


def die_at(update: int, marker: Path | None = None) -> None:
    """Kill the process before that update of the training; with a marker file, only once."""
    original = Step.__call__

    def call(self: Step, batches: Any, passes: int, number: int) -> Tensor:
        if number == update and (marker is None or not marker.exists()):
            if marker is not None:
                marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batches, passes, number)

    Step.__call__ = call  # type: ignore[method-assign]


def run_killed(out: str, update: int, data: Any = None, options: dict[str, Any] | None = None) -> None:
    die_at(update)
    run(out, data, **(options or {}))


def run_killed_in_write(out: str, count: int) -> None:
    """Killed before the ``count``-th file is put in its place."""
    original, calls = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    files.os.replace = replace
    run(out)


def run_on_full_disk(out: str, limit: int, message: str) -> None:
    """A training that may write ``limit`` bytes into a file and no more; its error goes to the file ``message``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run(out)
    except InputError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(message).write_text(str(error))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--die-rank", type=int, default=0)
    parser.add_argument("--stall-at", type=int)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    if arguments.die_at is not None and rank == arguments.die_rank:
        die_at(arguments.die_at, Path(f"{arguments.out}.died"))
    data = None
    if arguments.stall_at is not None and rank == arguments.die_rank:
        data = stalling_data("training", arguments.stall_at, Path(f"{arguments.out}.stalls"))
    norms = grad_norms()
    result = run(arguments.out, data, **arguments.options)
    if rank == 0:
        print(json.dumps(norms))
        print(json.dumps(result.epochs))


if __name__ == "__main__":
    main()
