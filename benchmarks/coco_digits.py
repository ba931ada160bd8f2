"""A data set in COCO's format of images that ship with libraries: handwritten digits of scikit-learn, at random scales
and places on photographs of scikit-image and scikit-learn, with masks. Training and validation share neither
photographs nor digits. The same seed makes the same files.

    python benchmarks/coco_digits.py runs/coco_digits --images 2000
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from digits import validation_mask
from PIL import Image
from pycocotools import mask as coco_masks
from sklearn.datasets import load_digits
from torch import from_numpy

from asvit_fast.demo import photographs
from asvit_fast.files import to_json, write_atomic, write_folder

SPLITS = {"train": 0.8, "val": 0.2}
SIDES = (128, 321)  # pixels of an image, from and to below
DIGIT_SIDES = (20, 97)  # of a digit, within three quarters of the image
MOST_DIGITS = 5  # of an image; one in EMPTY has none
EMPTY = 20
INK = 0.35  # of the brightest pixel: what is a stroke
MOST_OVERLAP = 0.1  # of a digit's box by those before it
TRIES = 20


def write_coco_digits(folder: Path, images: int, seed: int = 0) -> None:
    """Write train/, val/ and annotations/instances_{train,val}.json into ``folder``, once.

    ``images``: of both splits together. Raises InputError where the folder cannot be written.
    """
    for split, part in SPLITS.items():
        target = folder / split
        if not (target / "0.png").is_file():
            write_folder(
                target, lambda scratch, s=split, p=part: _write_split(scratch, s, round(images * p), seed), "0.png"
            )
        (folder / "annotations").mkdir(exist_ok=True)
        content = (target / "annotations.json").read_text()
        write_atomic(folder / "annotations" / f"instances_{split}.json", content)


def _write_split(folder: Path, split: str, count: int, seed: int) -> None:
    generator = np.random.default_rng([seed, *split.encode()])
    backgrounds = [pixels for index, (_, pixels) in enumerate(photographs()) if (index % 5 == 0) == (split == "val")]
    loaded = load_digits()
    held_out = validation_mask(from_numpy(loaded.target).long()).numpy()  # [1797]
    own = np.flatnonzero(held_out == (split == "val"))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels = _background(backgrounds, generator)
        height, width = pixels.shape[:2]
        for digit, mask in _digits(pixels, loaded, own, generator):
            annotations.append(_annotation(len(annotations) + 1, number, digit, mask))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(to_json(content))


def _background(photographs: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """A part of a photograph: uint8 [height, width, 3]."""
    photograph = photographs[generator.integers(len(photographs))]
    height, width = (int(side) for side in generator.integers(*SIDES, size=2))
    zoom = generator.uniform(1, 2) * max(height / photograph.shape[0], width / photograph.shape[1])
    tall, wide = (
        max(round(side * zoom), least) for side, least in zip(photograph.shape, (height, width), strict=False)
    )
    scaled = np.asarray(Image.fromarray(photograph).resize((wide, tall), Image.Resampling.BILINEAR))
    top, left = generator.integers(tall - height + 1), generator.integers(wide - width + 1)
    return scaled[top : top + height, left : left + width].copy()


def _digits(
    pixels: np.ndarray, loaded: Any, own: np.ndarray, generator: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """Draw digits into an image; yields the class and mask, bool [height, width], of each."""
    height, width = pixels.shape[:2]
    taken = np.zeros((height, width), dtype=bool)
    wanted = 0 if generator.integers(EMPTY) == 0 else int(generator.integers(1, MOST_DIGITS + 1))
    for _ in range(wanted):
        for _ in range(TRIES):
            side = int(generator.integers(DIGIT_SIDES[0], min(DIGIT_SIDES[1], 3 * min(height, width) // 4)))
            top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
            place = slice(top, top + side), slice(left, left + side)
            if taken[place].mean() <= MOST_OVERLAP:
                break
        else:
            continue
        index = own[generator.integers(len(own))]
        small = Image.fromarray((loaded.images[index] * 255 / 16).astype(np.uint8))
        ink = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255  # [side, side], 0 to 1
        mask = np.zeros((height, width), dtype=bool)
        mask[place] = ink > INK
        mask &= ~taken  # what is drawn first is in front
        if not mask.any():
            continue
        taken |= mask
        dark = pixels[mask].mean() > 127
        colour = generator.integers(0, 60, 3) if dark else generator.integers(195, 256, 3)
        pixels[mask] = colour
        yield int(loaded.target[index]), mask


def _annotation(number: int, image: int, digit: int, mask: np.ndarray) -> dict[str, Any]:
    lengths = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": digit,
        "bbox": coco_masks.toBbox(lengths).tolist(),
        "area": int(coco_masks.area(lengths)),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": lengths["counts"].decode()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_coco_digits(arguments.folder, arguments.images, arguments.seed)


if __name__ == "__main__":
    main()
