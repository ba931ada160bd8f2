"""Reading a folder of images: which files, in what order, and what is said when it cannot be done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asvit_fast.errors import InputError
from asvit_fast.images import find_images, load_images


def write_image(path: Path, value: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve grey images whose value is 20 times their number; natural order differs from the order of strings."""
    for number in range(12):
        write_image(tmp_path / f"image{number}.png", 20 * number)
    return tmp_path


def grey(images: torch.Tensor) -> list[int]:
    """Undo ImageNet's normalisation and give each image's number back."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = images.mean(dim=(2, 3)) * std + mean  # [count, 3]
    return (values.mean(1) * 255 / 20).round().int().tolist()


def test_shape_type_and_normalisation(folder: Path) -> None:
    images = load_images(folder, 12, 32)
    assert images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.float32
    assert grey(images) == list(range(12))  # natural order: 9 comes before 10


def test_choice_is_even_spread_and_deterministic(folder: Path) -> None:
    assert grey(load_images(folder, 4, 32)) == [0, 3, 7, 11]
    assert torch.equal(load_images(folder, 5, 32), load_images(folder, 5, 32))
    assert grey(load_images(folder, 1, 32)) == [0]


def test_height_and_width(folder: Path) -> None:
    assert load_images(folder, 2, (32, 64)).shape == (2, 3, 32, 64)


def test_centre_crop(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:, 48:80] = 255  # a white band in the middle of a wide black image
    Image.fromarray(pixels).save(tmp_path / "band.png")
    image = load_images(tmp_path, 1, 32)[0].mean(dim=(0, 1))  # [32] columns
    assert image[16] > 1
    assert image[0] < -1
    assert image[-1] < -1


def test_class_folders_and_grey_or_transparent_images(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png", 10)
    write_image(tmp_path / "dog" / "deep" / "b.jpg", 20)
    Image.new("L", (20, 20)).save(tmp_path / "dog" / "grey.png")
    Image.new("RGBA", (20, 20)).save(tmp_path / "alpha.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    assert len(find_images(tmp_path)) == 4
    assert load_images(tmp_path, 4, 32).shape == (4, 3, 32, 32)


def test_missing_folder_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_images(tmp_path / "nowhere", 1, 32)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(InputError, match="is a file"):
        load_images(tmp_path / "file.txt", 1, 32)
    with pytest.raises(InputError, match="holds no images"):
        load_images(tmp_path, 1, 32)


def test_too_few_images_says_how_many_and_what_to_lower(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds 12 images but 16 are needed.*lower the batch to 12"):
        load_images(folder, 16, 32)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_broken_image_is_named(folder: Path, damage: str) -> None:
    path = folder / "image3.png"
    content = path.read_bytes()
    path.write_bytes({"text": b"hello", "truncated": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(InputError, match=r"image3\.png") as caught:
        load_images(folder, 12, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "img_size"), [(0, 32), (1, 0), (1, (32, -1))])
def test_impossible_sizes(folder: Path, count: int, img_size: int | tuple[int, int]) -> None:
    with pytest.raises(InputError):
        load_images(folder, count, img_size)
