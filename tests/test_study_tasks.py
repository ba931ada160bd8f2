"""The small tasks of studies: validation sees nothing of what training saw."""

from __future__ import annotations

import numpy as np
import study_tasks
from PIL import Image
from sklearn.datasets import load_digits


def test_regions_of_a_photograph_do_not_touch() -> None:
    columns = np.tile(np.arange(640.0)[:, None], (4, 1, 3))  # [4, 640, 3], each pixel its column
    left, right = (study_tasks.region(columns, split) for split in ("train", "val"))
    assert left.max() + 30 < right.min() and right.max() == 639


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
