"""Settings of how images are read: everything but which ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple

from ...errors import InputError
from ...recipe import TrainingRecipe, per_channel

AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe)
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name


@dataclass(frozen=True)
class Reader(Generic[AnyRecipe]):
    """Settings of how images are read and shared.

    Args:
        recipe: augmentation, seed, workers.
        img_size: a side, or height and width, in pixels.
        device: where batches are put.
        rank, ranks: which share of the images is read here.
        in_chans: channels of the images, 3 or 1.
        mean, std: what uint8 images are normalised with, parts of 255; their averages for another number of channels.

    Raises:
        InputError: another number of channels.
    """

    recipe: AnyRecipe
    img_size: int | tuple[int, int]
    device: torch.device
    rank: int = 0
    ranks: int = 1
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        if self.in_chans not in MODES:
            raise InputError(f"in_chans must be one of {', '.join(map(str, MODES))}, got {self.in_chans}")
        object.__setattr__(self, "mean", per_channel(self.mean, self.in_chans))
        object.__setattr__(self, "std", per_channel(self.std, self.in_chans))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        height, width = to_2tuple(self.img_size)
        return self.in_chans, height, width

    @property
    def mode(self) -> str:
        """Pillow's name of such images."""
        return MODES[self.in_chans]
