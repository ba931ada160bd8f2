"""Images: which files are some, how one is decoded, and a few of a folder for the scores, the same every time.

Of the scores only the NTK looks at images; labels are never used, so any folder will do: flat, or one subfolder per
class.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder, find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos
from timm.utils.misc import natural_key
from torch import Tensor

from .errors import InputError, first_line
from .settings import ImageSize, image_sides

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
KINDS = ", ".join(EXTENSIONS)
CROP_FRACTION = 0.875  # the usual evaluation crop: 224 pixels out of the short side's 256


class UnreadableImage(InputError):
    """An image file cannot be decoded, for whatever Pillow raises: OSError, SyntaxError, ValueError, struct.error."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"image {name!r} cannot be read ({first_line(error)}); repair it or remove it")
        self.name = name


class ImageFolder(ReaderImageFolder):
    """timm's reader of class folders, for more kinds of files and without hidden ones.

    Raises InputError for a folder without images.
    """

    def __init__(self, root: str | Path, class_map: str = "") -> None:
        Reader.__init__(self)
        self.root = str(root)
        paths = [path for path, _ in find_images_and_targets(self.root, EXTENSIONS)[0]]
        visible = {path: os.path.relpath(path, self.root) for path in paths}
        visible = {path: inside for path, inside in visible.items() if not is_hidden(inside)}
        classes = {path: os.path.basename(os.path.dirname(inside)) for path, inside in visible.items()}
        self.class_to_idx = load_class_map(class_map, self.root) if class_map else _numbered(set(classes.values()))
        self.samples = [(path, self.class_to_idx[name]) for path, name in classes.items() if name in self.class_to_idx]
        if not self.samples:
            of_map = f" of the classes in {class_map!r}" if class_map else ""
            raise InputError(f"image folder {self.root!r} holds no images ({KINDS}){of_map}; give another folder")


class ImageTar(ReaderImageInTar):
    """timm's reader of one tar file, for more kinds of files and without hidden ones.

    Raises InputError for a tar file without images.
    """

    def __init__(self, root: str | Path, class_map: str = "") -> None:
        Reader.__init__(self)
        if not tarfile.is_tarfile(root) or Path(root).suffix.lower() != ".tar":
            raise InputError(f"{str(root)!r} cannot be used: it is not a tar file (.tar); give one, or a folder")
        self.root, self.root_is_tar, self.cache_tarfiles = str(root), True, True
        numbers = load_class_map(class_map, self.root) if class_map else None
        try:
            found, targets, numbers, ((_, self.tar_state),) = extract_tarinfos(self.root, numbers, False, EXTENSIONS)
        except ValueError as error:  # nothing to unpack
            raise InputError(f"tar file {self.root!r} holds no images ({KINDS}); give another file") from error
        names = {number: name for name, number in numbers.items()}
        visible = [k for k, (info, _, _) in enumerate(found) if not is_hidden(info.path)]
        self.class_name_to_idx = numbers if class_map else _numbered({names[targets[k]] for k in visible})
        self.class_idx_to_name = {number: name for name, number in self.class_name_to_idx.items()}
        self.samples = found[visible]
        self.targets = np.array([self.class_name_to_idx[names[targets[k]]] for k in visible])


def _numbered(classes: set[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(classes, key=natural_key))}


def is_hidden(path: str) -> bool:
    """Whether a relative path is of what a Mac or a file manager puts beside the images."""
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(path).parts)


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below ``folder``, in natural order of the path. Raises InputError when there is none."""
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"image folder {str(folder)!r} does not exist; give a folder of images, or none for noise")
    if not folder.is_dir():
        raise InputError(f"image folder {str(folder)!r} is a file; give the folder that holds it")
    return [Path(path) for path, _ in ImageFolder(folder).samples]


def decode(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Any image of Pillow with 8 bits per channel: "RGB", or "L" for grey. Alpha is dropped.

    Pillow by itself cuts off everything above 255 in grey images of more bits. Here white is 65535 of 16 bits; of
    32-bit integers what the smallest of 8, 16 and 31 bits that holds the image calls white; of floats 1, or 255 where a
    pixel is larger than 1.
    """
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    elif image.mode in ("RGBa", "La"):  # premultiplied by alpha
        image = image.convert(image.mode.upper())
    elif image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float64)  # [H, W]
        highest = pixels.max(initial=0.0)
        if image.mode == "F":
            white = 1.0 if highest <= 1 else 255.0
        elif image.mode != "I" or image.format == "PNG":  # Pillow reads the 16 bits of a PNG into either
            white = 65535.0
        else:
            white = next(float(white) for white in (255, 65535, 2**31 - 1) if highest <= white)
        image = Image.fromarray((pixels / white * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("P", "PA") and mode != "P":
        image = image.convert("RGBA")  # what a palette's transparency is turned into, without a warning
    return image.convert(mode)


def fingerprint(images: Tensor) -> str:
    """Shape and hash of images in memory, to tell whether they are the same ones."""
    content = images.detach().cpu().contiguous()
    shape = "x".join(map(str, content.shape))
    return f"{shape} {hashlib.sha256(content.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]}"


def load_images(folder: str | Path, count: int, img_size: ImageSize = 224) -> Tensor:
    """``count`` images spread evenly over the sorted files of ``folder``: the same ones every time.

    Resized and centre-cropped to ``img_size`` pixels (a side, or height and width), with ImageNet's mean and standard
    deviation taken off; never augmented (augmentation would make the scores depend on more than seed and files).

    Returns float32 ``[count, 3, height, width]``. Raises InputError for a missing folder, a folder with fewer than
    ``count`` images, and an image that cannot be read, naming the file.
    """
    if count < 1:
        raise InputError(f"number of images must be at least 1, got {count}")
    height, width = image_sides(img_size)
    files = find_images(folder)
    if len(files) < count:
        raise InputError(
            f"image folder {str(folder)!r} holds {len(files)} images but {count} are needed; "
            f"add images or lower the batch to {len(files)}"
        )
    transform = create_transform(
        (3, height, width),
        is_training=False,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=CROP_FRACTION,
    )
    last, gaps = len(files) - 1, max(count - 1, 1)
    chosen = [files[index * last // gaps] for index in range(count)]  # both ends, as evenly spaced as integers can be
    return torch.stack([_read(path, transform) for path in chosen])  # [count, 3, height, width]


def _read(path: Path, transform) -> Tensor:
    """One image -> ``[3, height, width]``."""
    try:
        with Image.open(path) as image:
            pixels = decode(image)
    except Exception as error:
        raise UnreadableImage(str(path), error) from error
    return transform(pixels)
