"""Detectors made of a network and a description, and out of a checkpoint with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..backends import notify_once
from ..errors import InputError, one_line
from ..settings import DETECTORS
from ..training.build import build, checkpoint_file
from ..training.checkpoint import read_file, weights_of
from ..training.description import describe_checkpoint
from ..training.fields import Field, fits, is_list, is_plain, is_text, is_whole, one_of, shown
from .backbone import backbone
from .detectors import MAKERS, Detector


def _is_category(value: Any) -> bool:
    return is_list(value, lambda _: True, 2) and is_whole(value[0]) and is_text(value[1])


_TABLE: Field = (lambda value: isinstance(value, Mapping) and is_plain(value), "arguments by their names")
PREDICTOR = "_predictor."  # in the names of weights that depend on the classes
_FIELDS: dict[str, Field] = {
    "detector": one_of(DETECTORS),
    "pyramid": _TABLE,
    "detector_kwargs": _TABLE,
    "categories": (
        lambda value: is_list(value, _is_category),
        "ids and names of the classes",
    ),
}


@dataclass(frozen=True)
class TrainedDetector:
    """A detector with its weights, on the CPU, and what its file says.

    Attributes:
        model: the detector.
        name: of the backbone's network.
        detector: mask_rcnn, ...
        categories: (id, name) of the classes 1, 2, ...
        path: the file of the weights.
    """

    model: Detector
    name: str
    detector: str
    categories: list[tuple[int, str]]
    path: Path


def build_detector(
    network: nn.Module, detector: str, num_classes: int, pyramid: Mapping[str, Any], options: Mapping[str, Any]
) -> Detector:
    """A detector around a network: arguments of ``backbone`` and ``DetectorOptions``; the background is a class.

    Raises:
        InputError: arguments that these do not take.
    """
    try:
        return MAKERS[detector](backbone(network, **pyramid), num_classes, **options)
    except TypeError as error:
        raise InputError(f"{detector} cannot be made with these arguments: {one_line(error)}") from error


def is_detector(path: str) -> bool:
    """Whether the file or folder of a training is of a detector, and not of a classifier. Raises InputError for no
    checkpoint."""
    arguments = read_file(checkpoint_file(Path(path))).get("args")
    return isinstance(arguments, Mapping) and "detector" in arguments


def start_from(detector: Detector, path: str) -> None:
    """Load a detector's weights; what predicts other classes starts afresh, which warns once.

    Raises InputError where anything else does not fit.
    """
    path = str(checkpoint_file(Path(path)))
    weights, own = weights_of(read_file(path), path), detector.state_dict()
    afresh = [name for name in own if PREDICTOR in name and name in weights and weights[name].shape != own[name].shape]
    if afresh:
        notify_once(("predictors", path), f"{path} is of other classes: {', '.join(afresh)} start afresh")
    try:
        detector.load_state_dict({**weights, **{name: own[name] for name in afresh}})
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the weights of {path!r} are of another detector: {one_line(error)}") from error


def load_detector(path: str | Path, use_ema: bool = False, windows: str = "") -> TrainedDetector:
    """The detector of a training. No code of the file is run, and nothing that it names is opened.

    Args:
        path: the folder of ``asvit-fast detect train`` (its best checkpoint, else its last), or a checkpoint of one.
        use_ema: the moving average of the weights.
        windows: "fixed" or "split", where others are meant than the checkpoint says.

    Raises:
        InputError: no such file, not a detector's, fields of another type than they must have, no average.
    """
    path = checkpoint_file(Path(path))
    content = read_file(path)
    arguments = content.get("args")
    if not isinstance(arguments, Mapping) or "detector" not in arguments:
        raise InputError(f"{str(path)!r} is not a detector's; give a folder or checkpoint of asvit-fast detect train")
    for name, expected in _FIELDS.items():
        if not fits(arguments.get(name), expected):
            raise InputError(f"{str(path)!r}: {name} must be {expected[1]}, got {shown(arguments.get(name))}")
    stored = describe_checkpoint(content, path)
    categories = [(number, name) for number, name in arguments["categories"]]
    weights = weights_of(content, path, use_ema)
    network = build(stored.name, stored.options)
    detector, options = arguments["detector"], arguments["detector_kwargs"]
    pyramid = {**arguments["pyramid"], **({"windows": windows} if windows else {})}
    model = build_detector(network, detector, len(categories) + 1, pyramid, options)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the weights of {str(path)!r} do not fit {stored.name}: {one_line(error)}") from error
    return TrainedDetector(model, stored.name, detector, categories, path)
