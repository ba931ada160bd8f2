"""Small images and data sets for the tests of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from asvit_fast.recipe import Recipe
from asvit_fast.training.data import Reader, TrainingData, load_data

CPU = torch.device("cpu")
SIZE = 32


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(path)


def write_images(root: Path) -> None:
    """21 training and 7 validation images of 3 classes, all different."""
    for split, count in (("train", 7), ("val", 3)):
        for number, name in enumerate("abc"):
            for image in range(count - (split == "val" and name != "a")):
                write_image(root / split / name / f"{image}.png", hash((split == "val", number, image)) % 2**31)


def load(data: Any, rank: int = 0, ranks: int = 1, **options: Any) -> TrainingData:
    recipe = Recipe.of(**{"batch_size": 3, "workers": 0, "reprob": 0.5, **options})
    return load_data(data, Reader(recipe, SIZE, CPU, rank, ranks))


def together(batches: Any) -> tuple[Tensor, Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


class Listed(Dataset):
    """Samples of any kind."""

    def __init__(self, samples: list[tuple[Any, int]], targets: list[int] | None = None) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.samples[index]


def float_images(count: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, SIZE, SIZE), torch.arange(count) % 3
