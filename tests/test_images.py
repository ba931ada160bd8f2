"""Reading a folder of images: which files, in what order, and what is said when it cannot be done."""

from __future__ import annotations

import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from asvit_fast.errors import InputError
from asvit_fast.images import decode, find_images, load_images
from asvit_fast.recipe import Recipe
from asvit_fast.training.data.dataset import read
from asvit_fast.training.data.folders import open_split
from asvit_fast.training.data.reader import Reader


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


# ------------------------------------------------------------------ pixels of every kind

LEVELS = np.linspace(0, 255, 40 * 30).round().reshape(30, 40).astype(np.uint8)  # [H, W]
BRIGHT = (LEVELS // 2 + 128).astype(np.uint8)


def sixteen_bits(levels: np.ndarray) -> np.ndarray:
    """uint16 [H, W]: 255 is 65535, plus what 8 bits do not see."""
    return (levels.astype(np.uint32) * 257).clip(0, 65535).astype(np.uint16)


def rgba(levels: np.ndarray) -> Image.Image:
    image = Image.merge("RGBA", [Image.fromarray(levels)] * 4)
    image.putalpha(Image.fromarray(255 - LEVELS))
    return image


def png_of_16_bits(levels: np.ndarray, path: Path, kind: int) -> None:
    """A PNG of 16 bits per channel, written by hand: kind 0 grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    colours = channels - (kind in (4, 6))
    pixels = np.repeat(sixteen_bits(levels)[..., None], channels, 2).astype(">u2")  # [H, W, channels]
    pixels[..., colours:] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def save(image: Image.Image, path: Path, **options: object) -> None:
    image.save(path, **options)


def colour(levels: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(levels).convert("RGB").convert(mode)


def lab(levels: np.ndarray) -> Image.Image:
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(colour(levels, "RGB"), *profiles, outputMode="LAB")


def big_endian(levels: np.ndarray) -> Image.Image:
    return Image.frombytes("I;16B", levels.shape[::-1], sixteen_bits(levels).astype(">u2").tobytes())


def palette(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels).convert("P")


KINDS = {  # how to write a file of grey levels [H, W]; ending
    "grey": (lambda v, p: save(Image.fromarray(v), p), ".png"),
    "grey, 16 bits": (lambda v, p: png_of_16_bits(v, p, 0), ".png"),
    "colour, 16 bits": (lambda v, p: png_of_16_bits(v, p, 2), ".png"),
    "grey and alpha, 16 bits": (lambda v, p: png_of_16_bits(v, p, 4), ".png"),
    "colour and alpha, 16 bits": (lambda v, p: png_of_16_bits(v, p, 6), ".png"),
    "16 bits as TIFF": (lambda v, p: save(Image.fromarray(sixteen_bits(v)), p), ".tif"),
    "16 bits, big-endian TIFF": (lambda v, p: save(big_endian(v), p), ".tiff"),
    "32-bit integers": (lambda v, p: save(Image.fromarray(sixteen_bits(v).astype(np.int32)), p), ".tif"),
    "8 bits in 32-bit integers": (lambda v, p: save(Image.fromarray(v.astype(np.int32)), p), ".tif"),
    "floats to 1": (lambda v, p: save(Image.fromarray(v.astype(np.float32) / 255), p), ".tif"),
    "floats to 255": (lambda v, p: save(Image.fromarray(v.astype(np.float32)), p), ".tif"),
    "alpha": (lambda v, p: save(rgba(v), p), ".png"),
    "grey and alpha": (lambda v, p: save(rgba(v).convert("LA"), p), ".png"),
    "palette": (lambda v, p: save(palette(v), p), ".png"),
    "transparent palette": (lambda v, p: save(palette(v), p, transparency=bytes(range(256))), ".png"),
    "CMYK": (lambda v, p: save(colour(v, "CMYK"), p), ".tif"),
    "CMYK as JPEG": (lambda v, p: save(colour(v, "CMYK"), p, quality=100), ".jpg"),
    "YCbCr": (lambda v, p: save(colour(v, "YCbCr"), p), ".tif"),
    "LAB": (lambda v, p: save(lab(v), p), ".tif"),
    "WebP": (lambda v, p: save(colour(v, "RGB"), p, lossless=True), ".webp"),
    "BMP": (lambda v, p: save(Image.fromarray(v), p), ".BMP"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("levels", [LEVELS, BRIGHT, LEVELS // 4], ids=["all", "bright", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_every_kind(kind: str, levels: np.ndarray, tmp_path: Path) -> None:
    """In scoring and in training alike."""
    write, ending = KINDS[kind]
    for name in ("grey", kind):
        (tmp_path / name / "train" / "a").mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(tmp_path / "grey" / "train" / "a" / "plain.png")
    write(levels, tmp_path / kind / "train" / "a" / f"image{ending}")
    if kind == "grey":
        (tmp_path / "grey" / "train" / "a" / "plain.png").unlink()
    tolerance = {"CMYK as JPEG": 4, "LAB": 4, "palette": 4, "transparent palette": 4}.get(kind, 1)
    for mode in ("RGB", "L"):
        dataset = open_split(tmp_path / kind, reader(1 if mode == "L" else 3, train_split="train"), training=True)
        pixels = np.asarray(read(dataset, 0, mode)[0]).astype(int)
        assert pixels.shape == ((30, 40, 3) if mode == "RGB" else (30, 40))
        assert np.abs(pixels - (levels[..., None] if mode == "RGB" else levels)).max() <= tolerance
    scored = load_images(tmp_path / kind, 1, 30) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    plain = load_images(tmp_path / "grey", 1, 30) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert float((scored - plain).abs().max()) * 255 <= tolerance + 1


def test_thirty_two_bits_fill_their_range() -> None:
    pixels = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    assert np.asarray(decode(pixels, "L")).tolist() == [[0, 128, 255]]
    assert np.asarray(decode(Image.fromarray(np.array([[-5, 300]], dtype=np.int32)), "L")).tolist() == [[0, 1]]


# ------------------------------------------------------------------ which files are images


def reader(in_chans: int = 3, **options: str) -> Reader:
    """Images of the folder itself, if no split is named."""
    return Reader(Recipe.of(**{"train_split": "", **options}), 30, torch.device("cpu"), in_chans=in_chans)


@pytest.fixture
def cluttered(tmp_path: Path) -> Path:
    """Two classes of every kind of image file, with what a Mac leaves in a folder that it packs."""
    for name in ("b", "a"):
        for ending in (".jpg", ".JPEG", ".png", ".webp", ".tif", ".tiff", ".bmp"):
            write_image(tmp_path / "data" / name / f"image{ending}", 50)
    write_image(tmp_path / "data" / "a" / "._image.jpg", 0)
    write_image(tmp_path / "data" / "__MACOSX" / "a" / "image.png", 0)
    write_image(tmp_path / "data" / ".thumbnails" / "image.png", 0)
    (tmp_path / "data" / "__MACOSX" / "a" / "._image.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "data" / "a" / ".DS_Store").write_bytes(b"\x00")
    return tmp_path / "data"


def test_kinds_of_files(cluttered: Path) -> None:
    expected = [str(path.relative_to(cluttered)) for path in find_images(cluttered)]
    assert len(expected) == 14 and not any("MACOSX" in name or "/." in name or name[0] == "." for name in expected)
    assert load_images(cluttered, 14, 32).shape == (14, 3, 32, 32)
    with tarfile.open(cluttered.parent / "data.tar", "w") as packed:
        packed.add(cluttered, ".")
    for data in (cluttered, cluttered.parent / "data.tar"):
        dataset = open_split(data, reader(), training=True)
        assert len(dataset) == 14
        names = [dataset.filename(k).removeprefix("./") for k in range(14)]
        targets = [int(read(dataset, k, "RGB")[1]) for k in range(14)]
        assert sorted(zip(names, targets, strict=True)) == sorted((name, int(name[0] == "b")) for name in expected)


def test_a_class_map_and_hidden_folders(cluttered: Path) -> None:
    (cluttered.parent / "classes.txt").write_text("c\nb\n")
    dataset = open_split(cluttered, reader(class_map=str(cluttered.parent / "classes.txt")), training=True)
    assert {target for _, target in dataset.reader.samples} == {1} and len(dataset) == 7
    (cluttered.parent / "classes.txt").write_text("x\ny\n")
    with pytest.raises(InputError, match=r"no images .* of the classes"):
        open_split(cluttered, reader(class_map=str(cluttered.parent / "classes.txt")), training=True)


def test_only_hidden_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "._image.png", 0)
    with pytest.raises(InputError, match=r"holds no images \(.*webp"):
        load_images(tmp_path, 1, 32)
