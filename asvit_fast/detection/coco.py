"""Images and objects in COCO's format: a folder with instances_*.json, or a data set of torchvision, checked.

What contradicts itself is refused before any work, with the first such entry and how many there are: ids that come
twice, annotations of images or categories that the file does not have, files that are missing, run lengths of another
size than the image. What is merely no object is left out, counted in a warning: boxes without a part inside the image,
segmentations without a polygon of three points. Boxes that reach over the border are cut off there. Images without
objects stay: they have nothing to find. Crowds are not learnt; evaluation ignores what is found in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from ..files import file_errors, from_json
from ..images import UnreadableImage, decode
from ..training.fields import is_finite, is_whole, shown

Entry = Mapping[str, Any]
LEAST_POINTS = 3  # of a polygon


@dataclass(frozen=True)
class Object:
    """An object of an image: its class (from 1), box (left, top, right, bottom) in pixels inside the image, and what
    the file says of it."""

    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    entry: Entry


@dataclass(frozen=True)
class ImageEntry:
    """An image file and what is in it."""

    id: int
    path: Path
    height: int
    width: int
    objects: tuple[Object, ...]


class CocoImages:
    """A split: ``dataset[i]`` is (PIL image, ImageEntry). It raises UnreadableImage for a file that cannot be read, or
    has another size than it says.

    Attributes:
        images: what there is, in the order of the file.
        categories: (id, name) of the classes 1, 2, ..., in the order of their ids, which may have holes.
        left_out: what was left out, a line for each kind.
    """

    def __init__(self, content: Any, root: Path, source: str, masks: bool) -> None:
        self.source, self.masks = source, masks
        images, annotations, categories = (
            _entries(content, name, source) for name in ("images", "annotations", "categories")
        )
        self.categories = _categories(categories, source)
        labels = {number: label for label, (number, _) in enumerate(self.categories, start=1)}
        sizes = _sizes(images, source)
        self.left_out: Counter[str] = Counter()
        objects: dict[int, list[Object]] = {number: [] for number in sizes}
        for entry in _with_known(annotations, sizes, labels, source):
            one = self._object(entry, sizes[entry["image_id"]], labels)
            if one is not None:
                objects[entry["image_id"]].append(one)
        self.images = [
            ImageEntry(entry["id"], root / entry["file_name"], *sizes[entry["id"]], tuple(objects[entry["id"]]))
            for entry in images
        ]
        _check_files(self.images, source)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, ImageEntry]:
        entry = self.images[index]
        try:
            with Image.open(entry.path) as image:
                pixels = decode(image, "RGB")
        except Exception as error:  # whatever Pillow raises
            raise UnreadableImage(str(entry.path), error) from error
        if pixels.size != (entry.width, entry.height):
            text = (
                f"it has {pixels.size[0]} x {pixels.size[1]} pixels, {self.source} says {entry.width} x {entry.height}"
            )
            raise UnreadableImage(str(entry.path), ValueError(text))
        return pixels, entry

    @property
    def class_names(self) -> list[str]:
        return [name for _, name in self.categories]

    @property
    def warning(self) -> str:
        """A line about what was left out; "" if nothing was."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.left_out.items())
        return f"{self.source}: left out {counts}" if counts else ""

    def _object(self, entry: Entry, size: tuple[int, int], labels: Mapping[int, int]) -> Object | None:
        """None for what is no object."""
        box = _inside(_box(entry, self.source), size)
        if box is None:
            self.left_out["boxes without a part inside the image"] += 1
            return None
        crowd = bool(entry.get("iscrowd", 0))
        if self.masks:
            entry = {**entry, "segmentation": _segmentation(entry, size, self.source)}
            if not entry["segmentation"]:
                self.left_out["segmentations without a polygon of three points"] += 1
                return None
        return Object(labels[entry["category_id"]], box, crowd, entry)


def mask_of(entry: Entry, height: int, width: int) -> np.ndarray:
    """The mask of an annotation: uint8 [height, width]. Needs pycocotools."""
    return coco_masks().decode(run_lengths(entry["segmentation"], height, width))


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or run lengths as pycocotools' compressed run lengths."""
    masks = coco_masks()
    if isinstance(segmentation, list):
        return masks.merge(masks.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return masks.frPyObjects(segmentation, height, width)
    return segmentation


def coco_masks() -> Any:
    """pycocotools.mask. Raises InputError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise InputError("masks and AP need pycocotools; pip install 'asvit-fast[detection]'") from None
    return mask


# --------------------------------------------------------------------------- finding a split


def open_coco(data: Any, split: str, masks: bool) -> CocoImages:
    """The split of a folder, or a ``torchvision.datasets.CocoDetection`` (whose transforms are not used).

    Of a folder, it is instances_NAME.json, in the folder or its annotations/, where NAME is the split or begins with it
    (train2017); its images are in NAME/, images/NAME/, images/ or the folder itself.

    Raises:
        InputError: no such folder or file, several that could be meant, or a file that contradicts itself.
    """
    if not isinstance(data, (str, Path)):
        coco, root = getattr(data, "coco", None), getattr(data, "root", None)
        if coco is None or root is None:
            raise InputError(
                "data must be a folder in COCO's format or torchvision.datasets.CocoDetection, got "
                f"{type(data).__name__}"
            )
        return CocoImages(coco.dataset, Path(root), f"{type(data).__name__} of {str(root)!r}", masks)
    path = _find_annotations(Path(data), split)
    with file_errors("read", path):
        text = path.read_bytes()
    try:
        content = from_json(text)
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}; give annotations in COCO's format") from None
    return CocoImages(content, _find_images(Path(data), path, content), repr(str(path)), masks)


def _find_annotations(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"data {str(folder)!r} is no folder; give one with instances_*.json and images")
    files = sorted({*folder.glob("instances_*.json"), *folder.glob("annotations/instances_*.json")})
    names = {path: path.stem.removeprefix("instances_") for path in files}
    exact = [path for path, name in names.items() if name == split]
    found = exact or [path for path, name in names.items() if name.startswith(split)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(path.name for path in (found or files)) or "none"
    reason = f"several: {there}; give the whole NAME" if found else f"there are {there}; give another split"
    raise InputError(f"{str(folder)!r} must have one instances_{split}*.json, here or in annotations/: {reason}")


def _find_images(folder: Path, annotations: Path, content: Any) -> Path:
    """The folder that has the first image."""
    name = annotations.stem.removeprefix("instances_")
    places = [folder / name, folder / "images" / name, folder / "images", folder]
    images = content.get("images") if isinstance(content, dict) else None
    first = images[0].get("file_name") if isinstance(images, list) and images and isinstance(images[0], dict) else None
    there = [place for place in places if isinstance(first, str) and (place / first).is_file()]
    return next(iter(there), next((place for place in places if place.is_dir()), folder))


# --------------------------------------------------------------------------- checks


def _entries(content: Any, name: str, source: str) -> list[Entry]:
    """The list of a file. Raises InputError unless it is one of objects."""
    found = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise InputError(f"{source}: {name} must be a list of objects, got {shown(found)}; give COCO's format")
    if not found and name != "annotations":
        raise InputError(f"{source} holds no {name}; give another file")
    return found


def _unique(entries: Sequence[Entry], name: str, source: str) -> None:
    """Raise InputError for an id that is none, or comes twice."""
    seen: set[int] = set()
    for entry in entries:
        number: Any = entry.get("id")
        if not is_whole(number):
            raise InputError(f"{source}: {name} must have whole numbers as ids, got {shown(number)}")
        if number in seen:
            raise InputError(f"{source}: two {name} have the id {number}; give each its own")
        seen.add(number)


def _categories(entries: Sequence[Entry], source: str) -> list[tuple[int, str]]:
    _unique(entries, "categories", source)
    return sorted((entry["id"], str(entry.get("name", entry["id"]))) for entry in entries)


def _sizes(images: Sequence[Entry], source: str) -> dict[int, tuple[int, int]]:
    """Height and width of every image by its id."""
    _unique(images, "images", source)
    for entry in images:
        if not all(is_whole(entry.get(side), 1) for side in ("height", "width")):
            raise InputError(f"{source}: image {entry['id']} must have a height and a width in pixels")
        if not isinstance(entry.get("file_name"), str):
            raise InputError(f"{source}: image {entry['id']} must have a file_name")
    return {entry["id"]: (entry["height"], entry["width"]) for entry in images}


def _with_known(
    annotations: Sequence[Entry], sizes: Mapping[int, Any], labels: Mapping[int, int], source: str
) -> Iterator[Entry]:
    """The annotations. Raises InputError where one is of an image or a category that the file does not have."""
    _unique(annotations, "annotations", source)
    for key, known, name in (("image_id", sizes, "images"), ("category_id", labels, "categories")):
        unknown = [entry for entry in annotations if not is_whole(entry.get(key)) or entry[key] not in known]
        if unknown:
            first = unknown[0]
            raise InputError(
                f"{source}: {len(unknown)} annotations are of {name} that it does not have: annotation {first['id']} "
                f"has {key} {shown(first.get(key))}; add the {name} or remove them"
            )
    yield from annotations


def _check_files(images: Iterable[ImageEntry], source: str) -> None:
    missing = [entry.path for entry in images if not entry.path.is_file()]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} of its images are missing, the first is {str(missing[0])!r}; restore them, in a "
            "folder of the split's name, or remove them from the file"
        )


def _box(entry: Entry, source: str) -> tuple[float, float, float, float]:
    """Left, top, width, height."""
    box = entry.get("bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_finite, box)):
        raise InputError(f"{source}: annotation {entry['id']} must have a bbox of four numbers, got {shown(box)}")
    return tuple(map(float, box))  # type: ignore[return-value]


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of the part inside the image; None where there is none."""
    left, top, width, height = box
    right, bottom = min(left + width, size[1]), min(top + height, size[0])
    left, top = max(left, 0.0), max(top, 0.0)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _segmentation(entry: Entry, size: tuple[int, int], source: str) -> Any:
    """Polygons of three points and more, or run lengths of the image's size."""
    found = entry.get("segmentation")
    where = f"{source}: the segmentation of annotation {entry['id']}"
    if isinstance(found, list):
        if not all(
            isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(is_finite, polygon)) for polygon in found
        ):
            raise InputError(f"{where} must be polygons [x, y, x, y, ...], got {shown(found)}")
        return [polygon for polygon in found if len(polygon) >= 2 * LEAST_POINTS]
    if not isinstance(found, Mapping) or not isinstance(found.get("counts"), (list, str)):
        raise InputError(
            f"{where} must be polygons or run lengths, got {shown(found)}; add it, or train a detector without masks"
        )
    stated = found.get("size")
    if not isinstance(stated, (list, tuple)) or list(stated) != list(size):
        raise InputError(f"{where} is of {shown(stated)} pixels, its image of {list(size)}; make it anew")
    pixels = _pixels_of(found["counts"])
    if pixels is None:
        raise InputError(f"{where} has counts that are no run lengths: {shown(found['counts'])}; make it anew")
    if pixels != size[0] * size[1]:
        raise InputError(f"{where} has runs of {pixels} pixels, its image {size[0] * size[1]}; make it anew")
    return dict(found)


def _pixels_of(counts: list[Any] | str) -> int | None:
    """The sum of run lengths, compressed ones as pycocotools packs them; None where they are none."""
    runs = _unpacked(counts) if isinstance(counts, str) else counts
    return sum(runs) if runs is not None and all(is_whole(run, 0) for run in runs) else None


def _unpacked(text: str) -> list[int] | None:
    """Five bits a character from the lowest on, the sixth says that more follow, the last of them is the sign; from
    the fourth run on, the difference to the run before the last. None where the text is none of this."""
    runs: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def drop_crowds(objects: Iterable[Object]) -> list[Object]:
    """What a detector learns from."""
    return [one for one in objects if not one.crowd]
