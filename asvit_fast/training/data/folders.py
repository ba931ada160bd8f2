"""Finding a data set by timm's names, and refusing what timm would read in another way than its user means."""

from __future__ import annotations

import importlib.util
import os
import tarfile
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset

from ...errors import InputError, first_line
from ...images import ImageFolder, ImageTar, is_hidden
from ...recipe import Recipe
from .reader import Reader

PACKAGES = {  # prefix of the name -> module, package of pip
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
}
ITERABLE = ("hfids", "wds", "tfds")  # read from the start to the end only
FOLDERS = ("", "folder", "tar")
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # timm's, in its order


def open_split(data: str | Path, reader: Reader[Recipe], training: bool) -> Any:
    """The training or validation split as timm reads it, undecoded where timm can leave it so; the split "" of a folder
    is the folder itself.

    Raises InputError: no such folder, split, package or class map; no images; class folders without images; images
    outside of class folders.
    """
    recipe = reader.recipe
    dataset, split = recipe.dataset, recipe.train_split if training else recipe.val_split
    prefix = dataset.partition("/")[0].lower()
    if prefix in FOLDERS:
        return _open_folder(_find_split(Path(data), split, training), recipe.class_map, reader.mode)
    if prefix not in (*PACKAGES, "torch"):
        raise InputError(
            f"dataset {dataset!r} is not known; use {', '.join(map(repr, FOLDERS))}, "
            "or a NAME as hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME"
        )
    module, package = PACKAGES.get(prefix, ("torchvision", "torchvision"))
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"dataset {dataset!r} needs the package {package}, which is not installed: pip install {package}"
        )
    options: dict[str, Any] = {"is_training": training, "seed": recipe.seed} if prefix in ITERABLE else {}
    if prefix != "torch":  # all but tfds leave an image as its file has it
        options |= {"class_map": recipe.class_map or None, "input_img_mode": reader.mode if prefix == "tfds" else ""}
    try:
        return create_dataset(dataset, root=str(data), split=split, **options)
    except Exception as error:  # each library has its own
        raise InputError(f"dataset {dataset!r}, split {split!r} of {str(data)!r}: {first_line(error)}") from error


# --------------------------------------------------------------------------- folders and tar files


def _open_folder(root: Path, class_map: str, mode: str) -> Any:
    if class_map and not Path(class_map).is_file() and not (root / class_map).is_file():
        raise InputError(f"class_map {class_map!r} is no file, neither here nor in {str(root)!r}; give its path")
    try:
        reader = ImageTar(root, class_map) if root.is_file() else ImageFolder(root, class_map)
        dataset = ImageDataset(str(root), reader=reader, input_img_mode=mode)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:  # no images, or a bad map
        raise InputError(f"data {str(root)!r} cannot be used: {first_line(error)}") from error
    if root.is_dir() and not class_map:
        _check_class_folders(root, [file for file, _ in dataset.reader.samples])
    return dataset


def _find_split(data: Path, split: str, training: bool) -> Path:
    """The folder or tar file of a split. Raises InputError, saying what there is."""
    if not data.exists():
        raise InputError(f"data folder {str(data)!r} does not exist; give the folder that holds the splits")
    if not split:
        return data
    if data.is_file():
        raise InputError(
            f"{str(data)!r} is one file and has no split {split!r}; give a folder with {split}.tar, "
            "or train on the file alone: train_split='', val_split=''"
        )
    synonyms = next((names for names in SYNONYMS if split in names), ())
    for name in (split, *synonyms):
        for candidate in (data / name, data / f"{name}.tar"):
            if candidate.exists():
                return candidate
    wanted = " or ".join(map(repr, dict.fromkeys((split, *synonyms))))
    raise InputError(f"data folder {str(data)!r} has no {wanted}; {_what_there_is(data, split, training)}")


def _what_there_is(data: Path, split: str, training: bool) -> str:
    names = sorted(entry.name for entry in data.iterdir() if entry.is_dir() or entry.suffix == ".tar")
    option, usual = ("train_split", ("train",)) if training else ("val_split", ("val", "valid", "validation", "test"))
    likely = [name for name in usual if name in names]
    hint = f"; did you mean {option}={likely[0]!r}?" if likely else ""
    otherwise = "; train_split='' takes the classes of the folder itself" if training else ""
    return f"it holds {some(names) if names else 'no folder'}{hint}{otherwise}"


def _check_class_folders(root: Path, files: list[str]) -> None:
    """Raise InputError for what would shift class numbers: a class without images, images without a class."""
    full = {Path(folder) for folder in {os.path.dirname(file) for file in files}}
    above = {parent for folder in full for parent in folder.parents} - full
    if root in full:
        raise InputError(f"{str(root)!r} holds images outside of class folders; put each into the folder of its class")
    empty = [
        str(folder.relative_to(root))
        for parent in above
        if parent == root or root in parent.parents
        for folder in parent.iterdir()
        if folder.is_dir() and folder not in full | above and not is_hidden(folder.name)
    ]
    if empty:
        raise InputError(
            f"class folder {some(sorted(empty))} of {str(root)!r} holds no images; add some, remove the folder, "
            "or give the names of the classes as class_map"
        )


def some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
