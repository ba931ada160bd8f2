"""The trainings of a study: one recipe for all, on images that are prepared once where the recipe allows it."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from .. import processes
from ..errors import InputError
from ..images import find_images
from ..recipe import Recipe
from ..settings import ImageSize
from ..topology import Topology
from ..training import train
from ..training.build import pixel_statistics
from ..training.data import Reader, load_validation
from ..training.schedule import RetokenizationSchedule
from ..training.step import Diverged
from ..training.training_setup import Data, TrainingSetup

HASHED_FILES = 10_000  # whose contents tell whether data are the same; of more, as many spread evenly
MOST_IN_MEMORY = 2 << 30  # bytes of images that are kept decoded


class Trained(NamedTuple):
    """Outcome of a training: percent, nats, seconds in training steps; all NaN but the time where it diverged."""

    top1: float
    eval_loss: float
    train_loss: float
    seconds: float


@dataclass
class Trainer:
    """Trains topologies with one recipe; see ``study`` for the arguments."""

    data: Data
    recipe: Recipe
    epochs: int
    img_size: ImageSize
    device: torch.device
    seed: int
    out: Path | None

    def __post_init__(self) -> None:
        self._prepared: Data | None = None

    def check(self, topology: Topology) -> None:
        """Make all that its training needs, and raise InputError for data or options that cannot be used."""
        with processes.alone():
            setup = TrainingSetup(
                topology,
                self._images(),
                RetokenizationSchedule.parse("1").for_epochs(self.epochs),
                self._recipe_of(0),
                self.epochs,
                self.device,
                img_size=self.img_size,
                progress=False,
            )
        if setup.images.num_classes < 2:
            raise InputError("data must hold images of two classes or more: of one, every network is always right")
        if not setup.images.has_validation:
            raise InputError("data must hold images for validation, in val/ or validation/: a study needs accuracies")

    def _images(self) -> Data:
        if self._prepared is None:
            self._prepared = prepared(self.data, self.recipe, self.img_size)
        return self._prepared

    def _recipe_of(self, repeat: int) -> Recipe:
        return replace(self.recipe, seed=self.seed + repeat, eval_interval=self.epochs)

    def folder(self, number: int, repeat: int) -> Path | None:
        """Where training ``repeat`` of topology ``number`` is kept until the topology is on record."""
        return None if self.out is None else self.out / f"{number:04}-{repeat}"

    def __call__(self, topology: Topology, number: int, repeat: int) -> Trained:
        """Train one network in this process alone, or go on with its training."""
        recipe = self._recipe_of(repeat)
        with processes.alone():
            try:
                result = train(
                    topology,
                    self._images(),
                    epochs=self.epochs,
                    out=self.folder(number, repeat),
                    img_size=self.img_size,
                    device=self.device,
                    progress=False,
                    **{name: getattr(recipe, name) for name in vars(recipe)},
                )
            except Diverged:
                return Trained(math.nan, math.nan, math.nan, 0.0)
        last = result.epochs[-1]
        return Trained(last["top1"], last["eval_loss"], last["train_loss"], result.seconds)


def prepared(data: Data, recipe: Recipe, img_size: ImageSize) -> Data:
    """The data as tensors in memory, where every epoch would decode the same pixels and they fit; else as they are."""
    if not isinstance(data, (str, Path)) or not recipe.no_aug or recipe.dataset or not recipe.val_split:
        return data
    mean, std = pixel_statistics("asvit", recipe)
    splits = []
    for split in (recipe.train_split, recipe.val_split):
        own = replace(recipe, val_split=split, workers=0)
        reader = Reader(own, img_size, torch.device("cpu"), mean=mean, std=std)
        images = load_validation(data, reader)
        size = math.prod((images.images, *reader.shape)) * torch.float32.itemsize
        if size > MOST_IN_MEMORY:
            return data
        pixels, targets = zip(*images.batches(recipe.batch_size), strict=True)
        splits.append(_tensors(pixels, targets))
    return splits[0], splits[1]


def _tensors(pixels: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> TensorDataset:
    """Batches [B, 3, H, W] and [B] as one data set."""
    return TensorDataset(torch.cat(pixels), torch.cat(targets))


def fingerprint_of(data: Data) -> str:
    """Number and hash of the files of a folder, by which a study knows its data again.

    Names and sizes of all files count, and contents of 10,000 of them. Of data sets in memory, their lengths.
    """
    if not isinstance(data, (str, Path)):
        return "data sets of " + " and ".join(str(len(part)) for part in data if part is not None)
    if not Path(data).is_dir():
        return str(data)
    files = find_images(data)
    digest = hashlib.sha256()
    spacing = max(1, math.ceil(len(files) / HASHED_FILES))
    for number, file in enumerate(files):
        digest.update(f"{file.relative_to(data).as_posix()} {os.path.getsize(file)}\n".encode())
        if number % spacing == 0:
            digest.update(file.read_bytes())
    return f"{len(files)} images {digest.hexdigest()[:16]}"
