"""timm's transforms with the choices of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch import Tensor

from ...errors import InputError, first_line
from ...recipe import Recipe
from .reader import Reader

Transform = Callable[[Image.Image], Tensor]
# what Pillow turns and shears images with; the others only resize
TURNING = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def make_transform(reader: Reader[Recipe], training: bool) -> Transform:
    """PIL image to uint8 ``reader.shape``: augmented (random erasing is left to the device), or resized and cropped as
    timm validates.

    Raises InputError for a policy or interpolation that timm does not know.
    """
    recipe = reader.recipe
    fixed = "bicubic" if recipe.interpolation == "random" else recipe.interpolation  # where nothing is drawn
    if training:
        options: dict[str, Any] = {
            "no_aug": recipe.no_aug,
            "scale": recipe.scale,
            "ratio": recipe.ratio,
            "hflip": recipe.hflip,
            "color_jitter": recipe.color_jitter or None,
            "auto_augment": recipe.aa or None,
            "interpolation": fixed if recipe.no_aug else recipe.interpolation,
        }
    else:
        options = {"interpolation": fixed, "crop_pct": recipe.crop_pct, "crop_mode": recipe.crop_mode}
    try:
        transform = create_transform(
            reader.shape, is_training=training, use_prefetcher=True, mean=reader.mean, std=reader.std, **options
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"timm knows no such augmentation: aa={recipe.aa!r}, interpolation={recipe.interpolation!r} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    for operation in _operations(transform):
        if isinstance(operation.kwargs["resample"], Image.Resampling) and operation.kwargs["resample"] not in TURNING:
            operation.kwargs["resample"] = Image.Resampling.BICUBIC
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _Posterize(operation.aug_fn)
    return transform


class _Posterize:
    """timm asks for 0 bits at its largest magnitude: a black image, which Pillow 13 refuses to make."""

    def __init__(self, posterize: Callable[..., Image.Image]) -> None:
        self.posterize = posterize

    def __call__(self, image: Image.Image, bits: int, **options: Any) -> Image.Image:
        return self.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def _operations(transform: Any) -> Iterator[Any]:
    """Yield those of timm's RandAugment, AutoAugment and AugMix inside a composed transform."""
    pending = list(transform.transforms)
    while pending:
        part = pending.pop()
        if isinstance(part, AugmentOp):
            yield part
        elif isinstance(part, (list, tuple)):
            pending += part
        else:
            pending += [*getattr(part, "ops", ()), *getattr(part, "policy", ())]
