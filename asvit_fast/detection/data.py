"""Batches of images and their objects, in an order and with augmentation that depend on seed, epoch and index alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..backends import notify_once
from ..errors import InputError
from ..recipe import DetectionRecipe
from ..training.data import Reader
from ..training.data.dataset import Samples
from ..training.data.loader import DevicePrefetcher, MapLoader
from .coco import CocoImages, ImageEntry, drop_crowds, mask_of, open_coco

Target = dict[str, Any]
Batch = tuple[list[Tensor], list[Target]]
SIDE_STEP = 32  # pixels between the short sides of multiscale training
LEAST_SIDE = 1  # pixels of a box that a crop leaves
FILL = tuple(round(255 * value) for value in IMAGENET_DEFAULT_MEAN)  # around images that are smaller than a crop


class Detections(NamedTuple):
    """Images uint8 [3, H, W] of their own sizes, and what is in each."""

    images: list[Tensor]
    targets: list[Target]
    skipped: tuple[str, ...] = ()


class ScaleJitter(v2.ScaleJitter):
    """torchvision's; thin images keep a pixel of each side."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return _at_least_a_pixel(super().make_params(flat_inputs))


class ShortestSize(v2.RandomShortestSize):
    """torchvision's; thin images keep a pixel of each side."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return _at_least_a_pixel(super().make_params(flat_inputs))


def _at_least_a_pixel(params: dict[str, Any]) -> dict[str, Any]:
    return {**params, "size": tuple(max(1, side) for side in params["size"])}


def make_augmentation(recipe: DetectionRecipe) -> v2.Transform:
    """torchvision's transforms of image, boxes and masks: a flip, then large-scale jitter (arXiv 2012.07177), a short
    side drawn from a range, or nothing."""
    steps: list[Any] = [v2.RandomHorizontalFlip(recipe.hflip)]
    if recipe.augmentation == "lsj":
        crop = (recipe.crop_size, recipe.crop_size)
        fill: Any = {tv_tensors.Image: FILL, "others": 0}
        steps += [ScaleJitter(crop, recipe.scale_jitter), v2.RandomCrop(crop, pad_if_needed=True, fill=fill)]
    elif recipe.augmentation == "multiscale":
        low, high = (int(side) for side in recipe.scales)
        steps.append(ShortestSize([*range(low, high, SIDE_STEP), high], recipe.max_size))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=LEAST_SIDE)])


class DetectionSamples(Samples):
    """Batches of a split, each asked for by (epoch, indices)."""

    def __init__(self, dataset: CocoImages, reader: Reader[DetectionRecipe], training: bool) -> None:
        self.dataset, self.seed, self.mode, self.tensors = dataset, reader.recipe.seed, reader.mode, None
        self.training, self.skip = training, reader.recipe.bad_images == "skip"
        self.augmentation = make_augmentation(reader.recipe) if training else None

    def finish(self, image: Image.Image, entry: ImageEntry) -> tuple[Tensor, Target]:
        """An image uint8 [3, H, W]; in training with its objects, else with its id."""
        pixels = v2.functional.pil_to_tensor(image)  # [3, H, W]
        if self.augmentation is None:
            return pixels, {"image_id": entry.id}
        objects = drop_crowds(entry.objects)
        size = (entry.height, entry.width)
        boxes = torch.tensor([one.box for one in objects], dtype=torch.float32).reshape(-1, 4)  # [n, 4]
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([one.label for one in objects], dtype=torch.int64),  # [n]
        }
        if self.dataset.masks:
            masks = [torch.from_numpy(mask_of(one.entry, *size)) for one in objects]
            empty = torch.zeros(0, *size, dtype=torch.uint8)
            target["masks"] = tv_tensors.Mask(torch.stack(masks) if masks else empty)  # [n, H, W]
        pixels, target = self.augmentation(tv_tensors.Image(pixels), target)
        return pixels.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _stack(self, samples: list[Any], skipped: list[str]) -> Detections:
        images, targets = zip(*samples, strict=True)
        return Detections(list(images), list(targets), tuple(skipped))


class DetectionLoader(MapLoader):
    """This rank's share of a split, as ``MapLoader`` deals it out."""

    def _samples_of(self, dataset: Any, reader: Reader[DetectionRecipe], classes: int, training: bool) -> Samples:
        return DetectionSamples(dataset, reader, training)


class DetectionPrefetcher(DevicePrefetcher):
    """Images on the device: float32 from 0 to 1; targets beside them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, batch: Any) -> Batch:
        images = [self._copy(image).to(torch.float32).div_(255) for image in batch.images]
        return images, [
            {name: self._copy(value) if isinstance(value, Tensor) else value for name, value in target.items()}
            for target in batch.targets
        ]


class DetectionData:
    """Training images and, where there are some, validation images of one rank: what ``Trainer`` asks of its data.

    Args:
        data: a folder in COCO's format, or a pair of ``CocoDetection`` (training, validation or None).
        reader: how they are read and shared.
        masks: whether objects have masks.

    Raises:
        InputError: data that cannot be used, or whose two splits have other categories.
    """

    is_stream = False

    def __init__(self, data: Any, reader: Reader[DetectionRecipe], masks: bool) -> None:
        recipe = reader.recipe
        if isinstance(data, tuple) and len(data) == 2:
            training, validation = (None if one is None else open_coco(one, "", masks) for one in data)
        else:
            if recipe.val_split and hasattr(data, "coco"):
                raise InputError(
                    "one data set cannot be both training and validation: give a pair (training, validation or None)"
                )
            training = open_coco(data, recipe.train_split, masks)
            validation = open_coco(data, recipe.val_split, masks) if recipe.val_split else None
        if training is None:
            raise InputError("data holds no training images; give a folder, or a pair whose first is a data set")
        self.training, self.validation = training, validation
        for split in filter(None, (training, validation)):
            if split.warning:
                notify_once(("left out", split.source), split.warning)
        self._check()
        self.categories, self.class_names = training.categories, training.class_names
        self.num_classes = len(self.categories)
        self._put = DetectionPrefetcher(reader.device)
        self._load = DetectionLoader(training, reader, self.num_classes, training=True)
        self._load_validation = (
            None if validation is None else DetectionLoader(validation, reader, self.num_classes, training=False)
        )
        self.images_per_rank = self._load.images
        self.train_images = self.images_per_rank * reader.ranks

    @property
    def has_validation(self) -> bool:
        return self.validation is not None

    def train_batches(self, epoch: int, start: int, batch_size: int) -> Iterator[Batch]:
        """This rank's batches of an epoch from its ``start``-th image on; a rest smaller than a batch is dropped."""
        whole = max(0, self.images_per_rank - start) // batch_size
        return self._put(self._load(epoch, start, start + whole * batch_size, batch_size))

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the validation images, one at a time: padding that fits one to another changes what a
        network with windows sees."""
        assert self._load_validation is not None
        return self._put(self._load_validation(0, 0, self._load_validation.images, 1))

    def _check(self) -> None:
        if self.validation is None:
            return
        if self.validation.categories != self.training.categories:
            raise InputError(
                f"the two splits have other categories: {self.training.source} {len(self.training.categories)}, "
                f"{self.validation.source} {len(self.validation.categories)}, or other ids or names; give both the same"
            )
        if not any(drop_crowds(entry.objects) for entry in self.validation.images):
            raise InputError(
                f"{self.validation.source} holds no object to find; give another val_split, or '' for none"
            )


def make_reader(
    recipe: DetectionRecipe, device: torch.device, rank: int = 0, ranks: int = 1
) -> Reader[DetectionRecipe]:
    """How images of any size are read."""
    return Reader(recipe, recipe.crop_size, device, rank, ranks)
