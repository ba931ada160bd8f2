"""Two small tasks for ``asvit-fast study``, made of images that libraries ship: no network, the same files every time.

    python benchmarks/study_tasks.py photographs build/tasks/photographs
    python benchmarks/study_tasks.py digits build/tasks/digits

photographs: which of 16 photographs and textures (scikit-image's, scikit-learn's, matplotlib's) a crop is of. A
photograph is cut into tiles like a chessboard: crops for training lie on its white tiles, those for validation on the
black ones, a strip between them belongs to neither. Crops are grey, as colours alone would tell many photographs apart,
and differ in size, orientation, contrast, brightness and noise.

digits: scikit-learn's handwritten digits of 8 x 8 pixels, enlarged, turned and put light on dark, with
light, with noise. The digits of validation are of other writers than those of training.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

Pixels = NDArray[np.float64]  # from 0 to 1

IMG_SIZE = 64  # pixels
IMAGES = {"train": 120, "val": 100}  # of each photograph
DIGITS = {"train": 180, "val": 120}  # of each digit
COLORS = {"train": 0, "val": 1}  # of the tiles, by (row + column) % 2
TILE = 112  # pixels, at least
GAP = 4  # pixels at each side of a tile that no crop has
CROP = (48, 104)  # pixels of a photograph, from and to
DIGIT = (44, 64)  # pixels of an enlarged digit, from and to
WRITERS = 1100  # scikit-learn's digits are sorted by writers: those before are for training
SEED = 2202
PHOTOGRAPHS = {  # as they lie in the folders of the libraries
    "skimage/data": (
        "astronaut.png", "brick.png", "cell.png", "chelsea.png", "coins.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
    "sklearn/datasets/images": ("china.jpg",),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}  # fmt: skip


def photographs() -> dict[str, Pixels]:
    """All photographs by their names, in grey: [H, W, 3]."""
    found = {}
    for folder, names in PHOTOGRAPHS.items():
        package, _, inside = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"study_tasks: {package} is missing; pip install 'asvit-fast[demo]'")
        for name in names:
            with Image.open(Path(spec.origin).parent / inside / name) as image:
                found[Path(name).stem] = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64) / 255
    return found


def tiles(photograph: Pixels, split: str) -> list[Pixels]:
    """The tiles of a photograph [H, W, 3] that belong to a split."""
    rows, columns = (np.linspace(0, side, max(side // TILE, 1) + 1).astype(int) for side in photograph.shape[:2])
    return [
        photograph[rows[row] + GAP : rows[row + 1] - GAP, columns[column] + GAP : columns[column + 1] - GAP]
        for row in range(len(rows) - 1)
        for column in range(len(columns) - 1)
        if (row + column) % 2 == COLORS[split]
    ]


def crop(photograph: Pixels, rng: np.random.Generator) -> Pixels:
    """A square piece of [H, W, 3], turned by quarters and mirrored: [IMG_SIZE, IMG_SIZE, 3]."""
    side = int(rng.integers(CROP[0], min(CROP[1], *photograph.shape[:2]) + 1))
    top, left = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
    piece = np.rot90(photograph[top : top + side, left : left + side], int(rng.integers(4)))
    if rng.random() < 0.5:
        piece = piece[:, ::-1]
    picture = Image.fromarray((piece * 255).round().astype(np.uint8))
    return np.asarray(picture.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC), dtype=np.float64) / 255


def jittered(image: Pixels, rng: np.random.Generator) -> Pixels:
    """[H, W, 3] with another contrast, another brightness, and noise."""
    return image * rng.uniform(0.85, 1.15) + rng.uniform(-0.05, 0.05) + rng.normal(0, 0.02, image.shape)


def drawn(digit: Pixels, rng: np.random.Generator) -> Pixels:
    """An image [IMG_SIZE, IMG_SIZE, 3] of a digit [8, 8], anywhere, of any size, turned a little."""
    side = int(rng.integers(*DIGIT))
    picture = Image.fromarray(digit.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    turned = np.asarray(picture.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR))  # [side, side]
    top, left = (int(rng.integers(0, IMG_SIZE - side + 1)) for _ in range(2))
    image = np.full((IMG_SIZE, IMG_SIZE), rng.uniform(0.1, 0.3))
    image[top : top + side, left : left + side] += rng.uniform(0.4, 0.7) * turned.clip(0, 1)
    image += rng.normal(0, 0.05, image.shape)
    return np.repeat(image[..., None], 3, axis=2)


def save(image: Pixels, path: Path) -> None:
    """Write [H, W, 3] as a PNG of 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


def write_photographs(out: Path) -> int:
    """Write the first task and return its number of images."""
    names = photographs()
    for split_number, (split, count) in enumerate(IMAGES.items()):
        for class_number, (name, photograph) in enumerate(names.items()):
            rng = np.random.default_rng([SEED, 0, split_number, class_number])
            own = tiles(photograph, split)
            for number in range(count):
                save(jittered(crop(own[rng.integers(len(own))], rng), rng), out / split / name / f"{number:03}.png")
    return len(names) * sum(IMAGES.values())


def write_digits(out: Path) -> int:
    """Write the second task and return its number of images."""
    loaded = load_digits()
    pixels, targets = loaded.images / 16, loaded.target  # [1797, 8, 8] from 0 to 1; [1797]
    places = np.arange(len(targets))
    for split_number, (split, count) in enumerate(DIGITS.items()):
        own = places[(places < WRITERS) == (split == "train")]
        for digit in range(10):
            rng = np.random.default_rng([SEED, 1, split_number, digit])
            for number, index in enumerate(rng.choice(own[targets[own] == digit], count)):
                save(drawn(pixels[index], rng), out / split / str(digit) / f"{number:03}.png")
    return 10 * sum(DIGITS.values())


TASKS: dict[str, Callable[[Path], int]] = {"photographs": write_photographs, "digits": write_digits}


def main() -> None:
    """Write one task, as folders of classes in train/ and val/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    print(f"{TASKS[arguments.task](arguments.out)} images in {arguments.out}")


if __name__ == "__main__":
    main()
