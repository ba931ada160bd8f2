"""Real images for the scores: a few files of a folder, read the same way every time.

Only the NTK looks at images; labels are never used, so any folder will do: flat, or one subfolder per class.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .errors import InputError

CROP_FRACTION = 0.875  # the usual evaluation crop: 224 pixels out of the short side's 256


class UnreadableImage(InputError):
    """An image file cannot be decoded, for whatever Pillow raises: OSError, SyntaxError, ValueError, struct.error."""

    def __init__(self, name: str, error: Exception) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        super().__init__(f"image {name!r} cannot be read ({reason}); repair it or remove it")
        self.name = name


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below ``folder``, in natural order of the path. Raises InputError when there is none."""
    from timm.data.readers.reader_image_folder import find_images_and_targets

    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"image folder {str(folder)!r} does not exist; give a folder of images, or none for noise")
    if not folder.is_dir():
        raise InputError(f"image folder {str(folder)!r} is a file; give the folder that holds it")
    found, _ = find_images_and_targets(str(folder))
    if not found:
        raise InputError(f"image folder {str(folder)!r} holds no images (.jpg, .jpeg, .png); give another folder")
    return [Path(path) for path, _ in found]


def load_images(folder: str | Path, count: int, img_size: int | tuple[int, int] = 224) -> Tensor:
    """``count`` images spread evenly over the sorted files of ``folder``: the same ones every time.

    Resized and centre-cropped to ``img_size`` pixels (a side, or height and width), with ImageNet's mean and standard
    deviation taken off; never augmented (augmentation would make the scores depend on more than seed and files).

    Returns float32 ``[count, 3, height, width]``. Raises InputError for a missing folder, a folder with fewer than
    ``count`` images, and an image that cannot be read, naming the file.
    """
    if count < 1:
        raise InputError(f"number of images must be at least 1, got {count}")
    height, width = _size(img_size)
    files = find_images(folder)
    if len(files) < count:
        raise InputError(
            f"image folder {str(folder)!r} holds {len(files)} images but {count} are needed; "
            f"add images or lower the batch to {len(files)}"
        )
    transform = _transform(height, width)
    chosen = [files[index] for index in _spread(len(files), count)]
    return torch.stack([_read(path, transform) for path in chosen])  # [count, 3, height, width]


def _size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height < 1 or width < 1:
        raise InputError(f"image size must be positive, got {height}x{width} pixels")
    return height, width


def _spread(total: int, count: int) -> list[int]:
    """``count`` of the indices 0..total-1, both ends included, as evenly spaced as integers can be."""
    return [index * (total - 1) // max(count - 1, 1) for index in range(count)]


def _transform(height: int, width: int):
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

    return create_transform(
        (3, height, width),
        is_training=False,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=CROP_FRACTION,
    )


def _read(path: Path, transform) -> Tensor:
    """One image -> ``[3, height, width]``."""
    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except Exception as error:
        raise UnreadableImage(str(path), error) from error
    return transform(pixels)
