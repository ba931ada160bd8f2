"""The small tasks of studies: validation sees nothing of what training saw."""

from __future__ import annotations

import numpy as np
import study_tasks
from PIL import Image
from sklearn.datasets import load_digits


def test_tiles_of_a_photograph_do_not_touch() -> None:
    height, width = 240, 640
    pixels = np.arange(height * width, dtype=float).reshape(height, width, 1).repeat(3, 2)  # [H, W, 3], each its number
    train, val = ([tile[..., 0].astype(int) for tile in study_tasks.tiles(pixels, split)] for split in ("train", "val"))
    assert len(train) == len(val) == 5
    owner = np.zeros(height * width, dtype=int)  # of each pixel: nobody, training or validation
    for number, owned in enumerate((train, val), start=1):
        owner[np.concatenate([tile.ravel() for tile in owned])] = number
    owner = owner.reshape(height, width)
    assert not np.any(owner[:, :-1] * owner[:, 1:] == 2) and not np.any(owner[:-1] * owner[1:] == 2)
    assert min(min(tile.shape) for tile in (*train, *val)) >= study_tasks.CROP[1]


def test_images_are_the_same_every_time_and_of_all_classes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study_tasks, "IMAGES", {"train": 2, "val": 1})
    monkeypatch.setattr(study_tasks, "DIGITS", {"train": 2, "val": 1})
    for task, classes in (("photographs", 16), ("digits", 10)):
        counts = [study_tasks.TASKS[task](tmp_path / again / task) for again in ("a", "b")]
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / task).rglob("*.png"))
        assert counts == [len(files)] * 2 == [3 * classes] * 2
        for file in files:
            first, second = (np.asarray(Image.open(tmp_path / again / file)) for again in ("a", "b"))
            assert first.shape == (64, 64, 3) and np.array_equal(first, second)


def test_writers_of_digits_are_apart() -> None:
    targets = load_digits().target
    assert 0 < study_tasks.WRITERS < len(targets)
    assert all((targets[study_tasks.WRITERS :] == digit).any() for digit in range(10))
