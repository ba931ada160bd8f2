"""``train``: progressive re-tokenization, coarse tokens first (As-ViT, arXiv 2202.11921, section 3.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..backends import rank_device
from ..errors import InputError
from ..recipe import Recipe
from .network import What
from .result import TrainResult
from .schedule import RetokenizationSchedule
from .trainer import Data, Trainer


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
        initial_checkpoint: weights to start from, in timm's format.
        resume: checkpoint of timm's train.py (or ours) whose training this one continues: weights, optimizer, average.
        recipe: the fields of ``Recipe``.

    Raises:
        InputError: an option or data that cannot be used (before any work), an image that cannot be read, a loss that
            is no number, a checkpoint that cannot be written; the last good checkpoint stays.
        SystemExit: with code 143, after SIGTERM and a checkpoint.
    """
    return Trainer(
        model,
        data,
        RetokenizationSchedule.parse(schedule).for_epochs(_whole("epochs", epochs)),
        Recipe.of(**recipe),
        epochs=epochs,
        out=None if out is None else Path(out),
        img_size=img_size,
        num_classes=num_classes,
        network={"model_kwargs": model_kwargs, "initial_checkpoint": initial_checkpoint},
        resume=resume,
        device=rank_device(device),
        progress=progress,
    ).run()


def _whole(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
