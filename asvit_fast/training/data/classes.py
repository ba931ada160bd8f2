"""The classes of a data set: their number, their names, and whether two data sets mean the same by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from ...errors import InputError
from .. import rng
from .folders import some


def class_names(dataset: Any) -> list[str] | None:
    """Names in the order of the classes' numbers, where the data set knows them; "" for a number that is not used."""
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset)
    if getattr(dataset, "classes", None) is not None:  # torchvision
        return [str(name) for name in dataset.classes]
    reader = getattr(dataset, "reader", None)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folders; tar files
    if not numbers:
        return None
    names = [""] * (1 + max(numbers.values()))
    for name, number in numbers.items():
        names[number] = str(name)
    return names


def count_classes(dataset: Any, num_classes: int | None = None) -> int:
    """Number of classes: of the names, or the largest target plus one; without ``targets``, all samples are read.

    Raises InputError for a stream that names no classes, and for more names than the number given.
    """
    names = class_names(dataset)
    if num_classes is not None:
        if len(names or ()) > num_classes:
            raise InputError(f"the images have {len(names or ())} classes, num_classes is {num_classes}; leave it out")
        return num_classes
    if names is not None:
        return len(names)
    if isinstance(dataset, IterableDataset):
        raise InputError("this data set does not say how many classes it has; give num_classes")
    return int(targets_of(dataset).max()) + 1


def check_same_classes(training: Any, validation: Any) -> None:
    """Raise InputError when two data sets number their classes differently, naming the classes."""
    ours, theirs = class_names(training), class_names(validation)
    if ours is None or theirs is None or ours == theirs:
        return
    missing = [name for name in ours if name not in theirs]
    unknown = [name for name in theirs if name not in ours]
    differences = [
        f"{text} {some(names)}" for text, names in (("without", missing), ("with unknown", unknown)) if names
    ]
    raise InputError(
        f"the validation images have other classes than the training images ({len(theirs)}, not {len(ours)}: "
        f"{'; '.join(differences) or 'in another order'}); give both the same class folders, or a class_map"
    )


def targets_of(dataset: Any) -> Tensor:
    """The target of every sample: ``[n]``."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if getattr(dataset, "targets", None) is not None:
        return torch.as_tensor(dataset.targets)
    with rng.preserved_random_state():
        return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])
