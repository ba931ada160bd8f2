"""Batches in memory out of a data set, in the main process or in workers: read, augment, stack."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, get_worker_info
from torchvision.transforms.functional import to_pil_image

from ...errors import InputError
from ...images import UnreadableImage, decode
from ...recipe import Recipe
from .. import rng
from .reader import Reader
from .transforms import make_transform

MOST_UNREADABLE = 100  # in a row; more is a broken disk, not a broken image
CHUNK = 16  # images that a worker sends at once when it reads a stream
Request = tuple[int, list[int]]  # epoch, indices
Sample = tuple[Tensor, int, list[int]]  # image uint8 or float [3, H, W], target, seeds of random erasing


class Batch(NamedTuple):
    """Images as they were read: uint8 ones are still to be normalised, float ones are ready."""

    images: Tensor  # uint8 or float [b, 3, H, W]
    targets: Tensor  # int64 [b]
    erase: Tensor  # int64 [b, 4]: seeds of random erasing, zeros for images that keep all pixels
    skipped: tuple[str, ...] = ()  # files that could not be read and had the next one take their place


class _Samples:
    """Common part of the samples of a split."""

    def __init__(self, dataset: Any, reader: Reader[Recipe], classes: int, training: bool) -> None:
        self.dataset, self.classes, self.seed, self.mode = dataset, classes, reader.recipe.seed, reader.mode
        self.transform = make_transform(reader, training)
        self.reprob = reader.recipe.reprob if training and not reader.recipe.no_aug else 0.0
        self.training, self.skip = training, reader.recipe.bad_images == "skip"

    def finish(self, image: Any, target: Any) -> Any:
        """A sample with its image transformed and its target checked."""
        number = -1 if target is None else int(target)
        if not 0 <= number < self.classes:
            raise InputError(f"an image has target {target}, which is none of the classes 0 to {self.classes - 1}")
        if isinstance(image, Tensor) and image.is_floating_point():
            return image, number, [0] * 4
        if isinstance(image, Tensor):
            image = to_pil_image(image)
        transformed = self.transform(decode(image, self.mode))  # uint8 [3, H, W]
        drawn = torch.rand(()).item() < self.reprob
        return transformed, number, torch.randint(1, 2**31, (4,)).tolist() if drawn else [0] * 4


class Samples(_Samples, Dataset):
    """Batches of a map-style data set, each asked for by (epoch, indices).

    A batch that cannot be read comes back as the InputError itself: raised in a worker, it would arrive as the text of
    a traceback.
    """

    def __init__(self, dataset: Any, reader: Reader[Recipe], classes: int, training: bool) -> None:
        super().__init__(dataset, reader, classes, training)
        self.tensors = float_tensors(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: Request) -> Batch | InputError:
        if self.tensors is not None:
            return self._select(self.tensors, request[1])
        main_process = get_worker_info() is None
        with rng.preserved_random_state() if main_process else contextlib.nullcontext():
            try:
                return self._read_all(*request)
            except InputError as error:
                return InputError(str(error))  # a plain one, that workers can send

    def _select(self, tensors: tuple[Tensor, Tensor], indices: list[int]) -> Batch:
        images, targets = (tensor.index_select(0, torch.tensor(indices, device=tensor.device)) for tensor in tensors)
        return Batch(images, targets.long(), torch.empty(0, 4, dtype=torch.int64))

    def _read_all(self, epoch: int, indices: list[int]) -> Any:
        skipped: list[str] = []
        samples = []
        for index in indices:
            rng.seed_augmentation(rng.seed_words(self.seed, epoch, index))
            samples.append(self.finish(*self._readable(index, skipped)))
        return self._stack(samples, skipped)

    def _stack(self, samples: list[Any], skipped: list[str]) -> Any:
        return stack(samples, skipped)

    def _readable(self, index: int, skipped: list[str]) -> tuple[Any, Any]:
        """The sample at ``index``, or the first after it that can be read, if that is wanted."""
        for offset in range(min(MOST_UNREADABLE, len(self))):
            try:
                return read(self.dataset, (index + offset) % len(self), self.mode)
            except UnreadableImage as error:
                if self.skip:
                    skipped.append(error.name)
                    continue
                advice = ", or go on without such images with bad_images=skip" if self.training else ""
                raise InputError(f"{error}{advice}") from error
        raise InputError(f"{len(skipped)} images in a row cannot be read, the last is {skipped[-1]!r}; check the disk")


class StreamSamples(_Samples, IterableDataset):
    """A data set that can only be read from its start, in chunks; workers share the work as timm's reader has it."""

    epoch = 0

    def __iter__(self) -> Iterator[Batch | InputError]:
        worker = get_worker_info()
        samples: list[Sample] = []
        try:
            for position, (image, target) in enumerate(self.dataset):
                rng.seed_augmentation(rng.seed_words(self.seed, self.epoch, worker.id if worker else 0, position))
                samples.append(self.finish(image, target))
                if len(samples) == CHUNK:
                    yield stack(samples)
                    samples = []
            if samples:
                yield stack(samples)
        except InputError as error:
            yield InputError(str(error))


def float_tensors(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Images ``[n, 3, H, W]`` and targets ``[n]`` when the whole data set is two tensors in memory and images float."""
    if isinstance(dataset, Subset) and (whole := float_tensors(dataset.dataset)) is not None:
        indices = torch.as_tensor(dataset.indices)  # [n]
        return whole[0][indices], whole[1][indices]
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2 and dataset.tensors[0].is_floating_point():
        return dataset.tensors[0], dataset.tensors[1]
    return None


def read(dataset: Any, index: int, mode: str) -> tuple[Any, Any]:
    """One sample, decoded. Raises UnreadableImage.

    timm's own ``dataset[index]`` silently reads another image in place of one that it cannot read.
    """
    if not isinstance(dataset, ImageDataset):
        try:
            return dataset[index][:2]
        except OSError as error:
            raise UnreadableImage(f"number {index} of {type(dataset).__name__}", error) from error
    try:
        file, target = dataset.reader[index][:2]
        with file, Image.open(file) as image:
            return decode(image, mode), target
    except Exception as error:
        raise UnreadableImage(dataset.filename(index, absolute=True) or f"number {index}", error) from error


def stack(samples: list[Sample], skipped: list[str] | None = None) -> Batch:
    """A batch of samples. Raises InputError where their images differ in shape or kind."""
    images, targets, erase = zip(*samples, strict=True)
    kinds = {(image.dtype, tuple(image.shape)) for image in images}
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{dtype} {list(shape)}" for dtype, shape in kinds))
        raise InputError(f"images of one batch must be alike, got {listed}; resize float images in the data set")
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(erase), tuple(skipped or ()))
