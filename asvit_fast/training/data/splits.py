"""Which images a training and its validation see, in which order, on which rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ...errors import InputError
from ...recipe import Recipe
from .. import rng
from .classes import check_same_classes, class_names, count_classes, targets_of
from .dataset import float_tensors
from .folders import open_split
from .loader import DevicePrefetcher, StreamLoader, make_loader
from .reader import Reader

DataSets = tuple[Any, Any]  # training, and validation or None
Batches = Iterator[tuple[Tensor, Tensor]]


class Validation:
    """One rank's share of images that are read in their order, unaugmented, each once (but for those that replace
    unreadable ones with ``bad_images="skip"``).

    A stream (hfids, wds, tfds) is shared among ranks by timm's reader, which may repeat images under several ranks to
    give all the same number.

    Attributes:
        images: number of images of this rank.
        num_classes: number of classes.
        class_names: their names in the order of their numbers, None where the data set has none.
    """

    def __init__(
        self, dataset: Any, classes: int, reader: Reader[Recipe], prefetch: DevicePrefetcher | None = None
    ) -> None:
        self.num_classes, self.class_names = classes, class_names(dataset)
        self._prefetch = prefetch or DevicePrefetcher(reader)
        self._load = make_loader(dataset, reader, classes, training=False)
        self.images = self._load.images

    def batches(self, batch_size: int) -> Batches:
        """(images float32 ``[b, 3, H, W]``, targets int64 ``[b]``) on the device; the last batch is smaller."""
        return self._prefetch(self._load(0, 0, self.images, batch_size))

    def batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """The distinct sizes of ``batches``, largest first."""
        sizes = (batch_size if self.images >= batch_size else 0, self.images % batch_size)
        return tuple(size for size in sizes if size)


class TrainingData:
    """Training images and, where there are some, validation images of one rank.

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
        is_stream: whether the order of the images depends on the numbers of ranks and workers.
        has_validation: whether there are validation images.
    """

    def __init__(self, train: Any, classes: int, reader: Reader[Recipe], validation: Any = None) -> None:
        self.num_classes, self.class_names = classes, class_names(train)
        self._reader, self._prefetch = reader, DevicePrefetcher(reader)
        self._load = make_loader(train, reader, classes, training=True)
        self.is_stream = isinstance(self._load, StreamLoader)
        self.images_per_rank = self._load.images
        self.train_images = self.images_per_rank * reader.ranks
        self.has_validation = validation is not None
        self._validation = Validation(validation, classes, reader, self._prefetch) if self.has_validation else None
        self._check_batch(reader.recipe.batch_size)

    def train_batches(self, epoch: int, start: int, batch_size: int) -> Batches:
        """This rank's batches of an epoch from its ``start``-th image on, each of exactly ``batch_size`` images.

        Yields (images float32 ``[b, 3, H, W]``, targets int64 ``[b]``), on the device; a rest smaller than a batch is
        dropped. With workers, asking for other batches ends the ones under way.

        Raises:
            InputError: fewer images than one batch; while iterating, an image that cannot be read, naming it.
        """
        self._check_batch(batch_size)
        whole = max(0, self.images_per_rank - start) // batch_size
        return self._prefetch(self._load(epoch, start, start + whole * batch_size, batch_size))

    def eval_batches(self, batch_size: int) -> Batches:
        """This rank's share of the validation images, unaugmented and each once; the last batch is smaller."""
        return self._held_out.batches(batch_size)

    def eval_batch_sizes(self, batch_size: int) -> tuple[int, ...]:
        """The distinct sizes of ``eval_batches``, largest first."""
        return self._held_out.batch_sizes(batch_size)

    @property
    def _held_out(self) -> Validation:
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


def load_data(data: str | Path | DataSets, reader: Reader[Recipe], num_classes: int | None = None) -> TrainingData:
    """Open training and validation images.

    Args:
        data: a path, opened as timm does by the recipe's ``dataset``, ``train_split``, ``val_split`` and
            ``class_map``; or a pair of map-style data sets, the second for validation or None. These yield (image,
            target): a PIL image or uint8 ``[3, H, W]`` is augmented, a float one is taken as it is.
        reader: how images are read.
        num_classes: number of classes where the data set does not say it, or not all of it.

    Raises:
        InputError: no such folder, split, package or class map; no images; classes that differ or lack images; fewer
            images than one batch.
    """
    if isinstance(data, tuple):
        train, held_out = data
        for dataset, name in ((train, "training"), (held_out, "validation")):
            if dataset is not None:
                _check_data_set(dataset, name, reader.shape)
    else:
        train = open_split(data, reader, training=True)
        held_out = open_split(data, reader, training=False) if reader.recipe.val_split else None
    classes = count_classes(train, num_classes)
    check_same_classes(train, held_out)
    for dataset in (train, held_out):
        _check_targets(dataset, classes)
    return TrainingData(train, classes, reader, held_out)


def load_validation(data: str | Path, reader: Reader[Recipe], num_classes: int | None = None) -> Validation:
    """The images of the recipe's ``val_split`` alone; arguments and errors as for ``load_data``."""
    dataset = open_split(data, reader, training=False)
    return Validation(dataset, count_classes(dataset, num_classes), reader)


def _check_data_set(dataset: Any, name: str, shape: tuple[int, int, int]) -> None:
    """Raise InputError unless the first sample is something that batches can be made of."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(f"the {name} set has no length or no indices; give a map-style data set, or a path")
    if not len(dataset):
        raise InputError(f"the {name} set holds no images; give another data set")
    try:
        with rng.preserved_random_state():
            sample = dataset[0]
    except OSError:
        return  # a file that cannot be read is named when its turn comes
    image = sample[0] if isinstance(sample, (tuple, list)) and len(sample) >= 2 else None
    if not isinstance(image, (Tensor, Image.Image)):
        raise InputError(f"the {name} set must yield (PIL image or tensor, class number), got {type(sample).__name__}")
    if isinstance(image, Tensor) and image.is_floating_point() and image.shape != shape:
        raise InputError(f"float images of the {name} set must be {list(shape)}, got {list(image.shape)}; resize them")


def _check_targets(dataset: Any, classes: int) -> None:
    """Check the targets of tensors in memory; those of other data sets are checked as they are read."""
    if float_tensors(dataset) is None:
        return
    lowest, highest = (int(value) for value in targets_of(dataset).aminmax())
    if lowest < 0 or highest >= classes:
        raise InputError(f"targets go from {lowest} to {highest}, there are classes 0 to {classes - 1}")
