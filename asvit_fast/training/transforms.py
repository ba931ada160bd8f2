"""timm's transforms with the choices of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch import Tensor

from ..errors import InputError
from ..recipe import Recipe
from .folders import first_line

Transform = Callable[[Image.Image], Tensor]
Channels = tuple[float, ...]
# what Pillow turns and shears images with; the others only resize
TURNING = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def training_transform(recipe: Recipe, shape: tuple[int, int, int], mean: Channels, std: Channels) -> Transform:
    """PIL image to uint8 ``shape``, augmented; random erasing is left to the device.

    Raises InputError for a policy or interpolation that timm does not know.
    """
    options = {
        "no_aug": recipe.no_aug,
        "scale": recipe.scale,
        "ratio": recipe.ratio,
        "hflip": recipe.hflip,
        "color_jitter": recipe.color_jitter or None,
        "auto_augment": recipe.aa or None,
        "interpolation": _fixed(recipe.interpolation) if recipe.no_aug else recipe.interpolation,
    }
    transform = _create(recipe, shape, is_training=True, mean=mean, std=std, **options)
    for operation in _operations(transform):
        if isinstance(operation.kwargs["resample"], Image.Resampling) and operation.kwargs["resample"] not in TURNING:
            operation.kwargs["resample"] = Image.Resampling.BICUBIC
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _Posterize(operation.aug_fn)
    return transform


def validation_transform(recipe: Recipe, shape: tuple[int, int, int], mean: Channels, std: Channels) -> Transform:
    """PIL image to uint8 ``shape``, resized and cropped as timm validates. Raises InputError as above."""
    return _create(
        recipe,
        shape,
        is_training=False,
        mean=mean,
        std=std,
        interpolation=_fixed(recipe.interpolation),
        crop_pct=recipe.crop_pct,
        crop_mode=recipe.crop_mode,
    )


def _create(recipe: Recipe, shape: tuple[int, int, int], **options: Any) -> Any:
    try:
        return create_transform(shape, use_prefetcher=True, **options)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"timm knows no such augmentation: aa={recipe.aa!r}, interpolation={recipe.interpolation!r} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _fixed(interpolation: str) -> str:
    """Where nothing is drawn, nothing can be random."""
    return "bicubic" if interpolation == "random" else interpolation


class _Posterize:
    """timm asks for 0 bits at its largest magnitude: a black image, which Pillow 13 refuses to make."""

    def __init__(self, posterize: Callable[..., Image.Image]) -> None:
        self.posterize = posterize

    def __call__(self, image: Image.Image, bits: int, **options: Any) -> Image.Image:
        return self.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _operations(transform: Any) -> Iterator[Any]:
    """Those of timm's RandAugment, AutoAugment and AugMix inside a composed transform."""
    pending = list(transform.transforms)
    while pending:
        part = pending.pop()
        if isinstance(part, AugmentOp):
            yield part
        elif isinstance(part, (list, tuple)):
            pending += part
        else:
            pending += [*getattr(part, "ops", ()), *getattr(part, "policy", ())]
