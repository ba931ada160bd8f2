"""Training data: images that cannot be read, and data that is refused, each with one line that says what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from training_images import SIZE, Listed, float_images, load, together, write_image, write_images

from asvit_fast.backends import FallbackWarning
from asvit_fast.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """To be damaged."""
    write_images(tmp_path / "data")
    return tmp_path / "data"


# --------------------------------------------------------------------------- images that cannot be read


def damage(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_epoch_by_name(images: Path, workers: int) -> None:
    name = damage(images / "train" / "b" / "3.png")
    data = load(images, workers=workers)
    with pytest.raises(InputError, match=rf"^image '{re.escape(name)}' cannot be read [^\n]* bad_images=skip$"):
        list(data.train_batches(0, 0, 3))


def test_an_image_that_vanished_is_named(images: Path) -> None:
    data = load(images)
    (images / "val" / "b" / "0.png").unlink()
    with pytest.raises(InputError, match=r"b/0\.png.*No such file"):
        list(data.eval_batches(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_an_unreadable_one(images: Path, workers: int) -> None:
    expected = together(load(images).train_batches(0, 0, 1))[1]
    names = [damage(images / "train" / "b" / f"{number}.png") for number in (5, 6)]
    data = load(images, workers=workers, bad_images="skip", no_aug=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = together(data.train_batches(0, 0, 3))
        second = together(data.train_batches(0, 0, 3))
    assert torch.equal(first[0], second[0])
    assert (first[1] - expected).tolist().count(1) == 2
    whole = first[0].flatten(1)
    assert (whole[:, None] == whole).all(2).sum(1).sort()[0].tolist() == [1] * 18 + [3] * 3  # all the first of c
    said = [str(warning.message) for warning in caught if warning.category is FallbackWarning]
    assert len(said) == 2 and all(any(name in text for text in said) for name in names)
    assert "2 images cannot be read" in said[1]


def test_nothing_but_unreadable_images(images: Path) -> None:
    for path in (images / "train").rglob("*.png"):
        damage(path)
    with pytest.raises(InputError, match="21 images in a row cannot be read"):
        next(load(images, bad_images="skip").train_batches(0, 0, 3))


# --------------------------------------------------------------------------- what is refused


def without(folder: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in (root / folder).rglob("*.png"):
            path.unlink()

    return change


def loose(root: Path) -> None:
    write_image(root / "train" / "x.png", 0)


def extra_class(root: Path) -> None:
    write_image(root / "val" / "d" / "0.png", 0)


def missing_class(root: Path) -> None:
    without("val/b")(root)
    (root / "val" / "b").rmdir()


def renamed_val(root: Path) -> None:
    (root / "val").rename(root / "test")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("train"), {}, "holds no images"),
        (without("train/b"), {}, r"class folder 'b' of .*holds no images"),
        (without("val/c"), {}, r"class folder 'c'"),
        (loose, {}, "outside of class folders"),
        (extra_class, {}, r"other classes.*4, not 3.*unknown 'd'"),
        (missing_class, {}, r"other classes.*2, not 3.*without 'b'"),
        (renamed_val, {}, r"no 'validation' or .*; it holds 'test', 'train'; did you mean val_split='test'"),
        (renamed_val, {"val_split": "held-out"}, r"val_split='test'"),
        (None, {"train_split": "training_set"}, r"no 'training_set'; it holds 'train', 'val'"),
        (None, {"batch_size": 22}, r"21 training images are fewer than one batch of 22; a batch_size up to 21 fits"),
        (None, {"class_map": "names.txt"}, r"class_map 'names.txt' is no file"),
        (None, {"dataset": "imagenet"}, r"'imagenet' is not known"),
        (None, {"aa": "bogus"}, r"aa='bogus'"),
        (None, {"interpolation": "cubist"}, r"interpolation must be one of .*'lanczos', 'random', got 'cubist'"),
    ],
)
def test_refused_folders(images: Path, change: Any, options: dict[str, Any], message: str) -> None:
    if change is not None:
        change(images)
    with pytest.raises(InputError, match=message) as caught:
        load(images, **options)
    assert "\n" not in str(caught.value)


def test_refused_paths(tmp_path: Path, images: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")
    file = tmp_path / "file.tar"
    file.touch()
    with pytest.raises(InputError, match="train_split=''"):
        load(file)
    with pytest.raises(InputError, match="cannot be used"):
        load(file, train_split="", val_split="")
    with pytest.raises(InputError, match="10 training images on each of 2 ranks are fewer"):
        load(images, ranks=2, batch_size=11)
    with pytest.raises(InputError, match="fewer than one batch of 30"):
        load(images).train_batches(0, 0, 30)


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (Listed([]), None, "training set holds no images"),
        (Listed([(torch.zeros(3, 8, 8), 0)] * 3), None, r"must be \[3, 32, 32\], got \[3, 8, 8\]"),
        (Listed([("text", 0)] * 3), None, "PIL image or tensor"),
        (range(3), None, "PIL image or tensor"),
        (iter([]), None, "map-style"),
        (TensorDataset(*float_images()), Listed([]), "validation set holds no images"),
        (
            TensorDataset(*float_images()),
            TensorDataset(float_images(1)[0], torch.tensor([3])),
            "targets go from 3 to 3, there are classes 0 to 2",
        ),
        (TensorDataset(float_images(3)[0], torch.tensor([0, -1, 1])), None, "targets go from -1 to 1"),
    ],
)
def test_refused_data_sets(train: Any, held_out: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load((train, held_out))


def test_targets_are_checked_as_they_are_read() -> None:
    samples = [(torch.zeros(3, SIZE, SIZE), target) for target in (0, 1, 2)]
    data = load((Listed(samples), Listed([*samples, (torch.zeros(3, SIZE, SIZE), 7)])))
    with pytest.raises(InputError, match="target 7, which is none of the classes 0 to 2"):
        list(data.eval_batches(2))
    mixed = Listed([*samples, (Image.new("RGB", (40, 40)), 0)])
    with pytest.raises(InputError, match="images of one batch must be alike"):
        list(load((mixed, None)).train_batches(0, 0, 4))


@pytest.mark.parametrize(
    ("dataset", "package"), [("hfds/x", "datasets"), ("hfids/x", "datasets"), ("tfds/x", "tensorflow-datasets")]
)
def test_packages_that_are_not_installed(
    tmp_path: Path, dataset: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        load(tmp_path, dataset=dataset)
