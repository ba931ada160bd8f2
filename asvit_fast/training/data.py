"""Images for training and validation: timm's data sets and augmentation, in batches that can be continued anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import InputError
from ..recipe import Recipe
from . import rng
from .batches import DevicePrefetcher, MapLoader, StreamLoader
from .classes import check_same_classes, class_names, count_classes, targets_of
from .folders import open_split
from .samples import Samples, StreamSamples, float_tensors
from .transforms import Transform, training_transform, validation_transform

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
DataSets = tuple[Any, Any]  # training, and validation or None
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Reader:
    """How images are read: everything but which ones."""

    recipe: Recipe
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    rank: int
    ranks: int

    @property
    def mode(self) -> str:
        return MODES[self.shape[0]]

    def transfer(self) -> DevicePrefetcher:
        return DevicePrefetcher(self.device, self.mean, self.std, self.recipe.remode)

    def samples(self, dataset: Any, classes: int, training: bool) -> Samples:
        recipe = self.recipe
        reprob = recipe.reprob if training and not recipe.no_aug else 0.0
        skip = recipe.bad_images == "skip"
        return Samples(dataset, self.transform(training), classes, recipe.seed, self.mode, reprob, skip)

    def stream(self, dataset: Any, classes: int, training: bool) -> StreamLoader:
        recipe = self.recipe
        reprob = recipe.reprob if training and not recipe.no_aug else 0.0
        samples = StreamSamples(dataset, self.transform(training), classes, recipe.seed, self.mode, reprob)
        return StreamLoader(samples, recipe.workers, self.device)

    def transform(self, training: bool) -> Transform:
        if training:
            return training_transform(self.recipe, self.shape, self.mean, self.std)
        return validation_transform(self.recipe, self.shape, self.mean, self.std)


class Validation:
    """One rank's share of images that are read in their order, unaugmented, each once (but for those that take the
    place of unreadable ones with ``bad_images="skip"``).

    A stream (hfids, wds, tfds) is shared among ranks by timm's reader, which may repeat images under several ranks to
    give all the same number.

    Attributes:
        images: number of images of this rank.
        num_classes: number of classes.
        class_names: their names in the order of their numbers, None where the data set has none.
    """

    def __init__(self, dataset: Any, classes: int, reader: Reader, transfer: DevicePrefetcher | None = None) -> None:
        self.num_classes, self.class_names = classes, class_names(dataset)
        self._transfer = transfer or reader.transfer()
        self._stream: StreamLoader | None = None
        if isinstance(dataset, IterableDataset):
            self._stream = reader.stream(dataset, classes, training=False)
            self.images = -(-_stream_length(dataset) // reader.ranks)
        else:
            samples = reader.samples(dataset, classes, training=False)
            self._indices = rng.shard(torch.arange(len(samples)), reader.rank, reader.ranks)  # [images]
            self._read = MapLoader(samples, reader.recipe.workers, reader.device)
            self.images = len(self._indices)

    def batches(self, batch_size: int) -> Batches:
        """(images float32 ``[b, 3, H, W]``, targets int64 ``[b]``) on the device; the last batch is smaller."""
        if self._stream is not None:
            return self._transfer(self._stream(0, 0, self.images, batch_size))
        pieces = self._indices.split(batch_size)  # one empty piece when there are no images
        return self._transfer(self._read(lambda: ((0, piece.tolist()) for piece in pieces if len(piece))))

    def batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """The distinct sizes of ``batches``, largest first."""
        sizes = (batch_size if self.images >= batch_size else 0, self.images % batch_size)
        return tuple(size for size in sizes if size)


class TrainingData:
    """What ``load_data`` returns.

    What a batch holds depends on the recipe's seed, the epoch and its position alone: not on the number of workers, on
    interruptions, or on how earlier batches were cut. One permutation of all images per epoch is dealt out to the
    ranks in turn, and each image is decoded and augmented with random numbers from (seed, epoch, its index). The main
    process' random states are left as they were.

    For streams (hfids, wds, tfds) the order is that of timm's reader: it repeats exactly for the same seed, epoch,
    number of workers and ranks, and does not depend on how batches were cut; a start in the middle reads and drops
    what comes before it. Their workers start anew in every pass, 0 workers means one, and what cannot be read is
    skipped by timm's reader.

    Attributes:
        num_classes: number of classes.
        class_names: their names in the order of their numbers, None where the data set has none.
        images_per_rank: images of one epoch on each rank.
        train_images: images of one epoch over all ranks.
    """

    def __init__(self, train: Any, classes: int, reader: Reader, validation: Any = None) -> None:
        self.num_classes, self.class_names = classes, class_names(train)
        self._reader = reader
        self._transfer = reader.transfer()
        self._stream: StreamLoader | None = None
        if isinstance(train, IterableDataset):
            self._stream = reader.stream(train, classes, training=True)
            self.images_per_rank = _stream_length(train) // reader.ranks
        else:
            self._samples = reader.samples(train, classes, training=True)
            self._read = MapLoader(self._samples, reader.recipe.workers, reader.device)
            self.images_per_rank = len(self._samples) // reader.ranks
        self.train_images = self.images_per_rank * reader.ranks
        self._validation = None if validation is None else Validation(validation, classes, reader, self._transfer)
        self._check_batch(reader.recipe.batch_size)

    @property
    def is_stream(self) -> bool:
        """Whether the order of the images depends on the numbers of ranks and workers."""
        return self._stream is not None

    @property
    def has_validation(self) -> bool:
        """Whether there are validation images."""
        return self._validation is not None

    def train_batches(self, epoch: int, start: int, batch_size: int) -> Batches:
        """This rank's batches of an epoch from its ``start``-th image on, each of exactly ``batch_size`` images.

        Yields (images float32 ``[b, 3, H, W]``, targets int64 ``[b]``), on the device; a rest smaller than a batch is
        dropped. With workers, asking for other batches ends the ones under way.

        Raises:
            InputError: fewer images than one batch; while iterating, an image that cannot be read, naming it.
        """
        self._check_batch(batch_size)
        whole = max(0, self.images_per_rank - start) // batch_size
        stop = start + whole * batch_size
        if self._stream is not None:
            return self._transfer(self._stream(epoch, start, stop, batch_size))
        reader = self._reader
        order = rng.epoch_order(len(self._samples), reader.recipe.seed, epoch)  # [images]
        pieces = rng.shard(order, reader.rank, reader.ranks)[start:stop].view(whole, batch_size)
        return self._transfer(self._read(lambda: ((epoch, piece.tolist()) for piece in pieces)))

    def eval_batches(self, batch_size: int) -> Batches:
        """This rank's share of the validation images, unaugmented and each once; the last batch is smaller."""
        return self._evaluated.batches(batch_size)

    def eval_batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """The distinct sizes of ``eval_batches``, largest first."""
        return self._evaluated.batch_sizes(batch_size)

    @property
    def _evaluated(self) -> Validation:
        if self._validation is None:
            raise InputError("there are no validation images; give a val_split, or a second data set")
        return self._validation

    def _check_batch(self, batch_size: int) -> None:
        if self.images_per_rank < batch_size:
            each = f" on each of {self._reader.ranks} ranks" if self._reader.ranks > 1 else ""
            raise InputError(
                f"{self.images_per_rank} training images{each} are fewer than one batch of {batch_size}; "
                f"a batch_size up to {self.images_per_rank} fits"
            )


def load_data(
    data: str | Path | DataSets,
    recipe: Recipe,
    img_size: int | tuple[int, int],
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    in_chans: int = 3,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    num_classes: int | None = None,
) -> TrainingData:
    """Open training and validation images.

    Args:
        data: a path, opened as timm does by the recipe's ``dataset``, ``train_split``, ``val_split`` and
            ``class_map``; or a pair of map-style data sets, the second for validation or None. These yield (image,
            target): a PIL image or uint8 ``[3, H, W]`` is augmented, a float one is taken as it is.
        recipe: augmentation, seed, workers.
        img_size: a side, or height and width, in pixels.
        device: where batches are put.
        rank, ranks: which share of the images is read here.
        in_chans: channels of the images, 3 or 1.
        mean, std: what uint8 images are normalised with, parts of 255; their averages for another number of channels.
        num_classes: number of classes where the data set does not say it, or not all of it.

    Raises:
        InputError: no such folder, split, package or class map; no images; classes that differ or lack images; fewer
            images than one batch.
    """
    reader = _reader(recipe, img_size, device, rank, ranks, in_chans, mean, std)
    if isinstance(data, tuple):
        train, held_out = data
        for dataset, name in ((train, "training"), (held_out, "validation")):
            if dataset is not None:
                _check_data_set(dataset, name, reader.shape)
    else:
        train = _open(data, reader, recipe.train_split, training=True)
        held_out = _open(data, reader, recipe.val_split, training=False) if recipe.val_split else None
    classes = count_classes(train, num_classes)
    check_same_classes(train, held_out)
    for dataset in (train, held_out):
        _check_targets(dataset, classes)
    return TrainingData(train, classes, reader, held_out)


def load_validation(
    data: str | Path,
    recipe: Recipe,
    img_size: int | tuple[int, int],
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    in_chans: int = 3,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    num_classes: int | None = None,
) -> Validation:
    """The images of the recipe's ``val_split`` alone; arguments and errors as for ``load_data``."""
    reader = _reader(recipe, img_size, device, rank, ranks, in_chans, mean, std)
    dataset = _open(data, reader, recipe.val_split, training=False)
    return Validation(dataset, count_classes(dataset, num_classes), reader)


def _reader(
    recipe: Recipe,
    img_size: int | tuple[int, int],
    device: torch.device,
    rank: int,
    ranks: int,
    in_chans: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Reader:
    if in_chans not in MODES:
        raise InputError(f"in_chans must be one of {', '.join(map(str, MODES))}, got {in_chans}")
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    mean, std = (tuple(values) if len(values) == in_chans else (fmean(values),) * in_chans for values in (mean, std))
    return Reader(recipe, (in_chans, height, width), mean, std, device, rank, ranks)


def _open(data: str | Path, reader: Reader, split: str, training: bool) -> Any:
    recipe = reader.recipe
    return open_split(data, recipe.dataset, split, recipe.class_map, training, recipe.seed, reader.mode)


def _check_data_set(dataset: Any, name: str, shape: tuple[int, int, int]) -> None:
    """Raise InputError unless the first sample is something that batches can be made of."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(f"the {name} set has no length or no indices; give a map-style data set, or a path")
    if not len(dataset):
        raise InputError(f"the {name} set holds no images; give another data set")
    try:
        with rng.unchanged_randomness():
            sample = dataset[0]
    except OSError:
        return  # a file that cannot be read is named when its turn comes
    image = sample[0] if isinstance(sample, (tuple, list)) and len(sample) >= 2 else None
    if not isinstance(image, (Tensor, Image.Image)):
        raise InputError(f"the {name} set must yield (PIL image or tensor, class number), got {type(sample).__name__}")
    if isinstance(image, Tensor) and image.is_floating_point() and image.shape != shape:
        raise InputError(f"float images of the {name} set must be {list(shape)}, got {list(image.shape)}; resize them")


def _check_targets(dataset: Any, classes: int) -> None:
    """Of tensors in memory; those of other data sets are checked as they are read."""
    if float_tensors(dataset) is None:
        return
    lowest, highest = (int(value) for value in targets_of(dataset).aminmax())
    if lowest < 0 or highest >= classes:
        raise InputError(f"targets go from {lowest} to {highest}, there are classes 0 to {classes - 1}")


def _stream_length(dataset: Any) -> int:
    images = getattr(dataset.reader, "num_samples", None)
    if not images:
        raise InputError(
            "this data set does not say how many images it has; give its number in the split's description"
        )
    return int(images)
