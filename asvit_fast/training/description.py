"""Descriptions of networks in files, field by field and checked: files come from anywhere.

Only what an architecture and its preprocessing need is taken. Everything that says where weights are, or how timm loads
them, is left in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from ..errors import InputError
from ..models.library import module_of, takes_size
from ..recipe import CROP_MODES, INTERPOLATIONS, are_numbers
from .fields import TEXT, Field, fits, is_list, is_plain, is_positive, is_size, is_text, one_of, shown, whole

LOADING = {  # arguments of timm that choose weights, files, caches or wrappers: none is the architecture's
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls", "weights", "progress", "device", "dtype"),
}
DATA = ("mean", "std", "crop_pct", "crop_mode", "interpolation")  # of images, but for their size
CHECKPOINT = (
    "arch", "model", "img_size", "input_size", "in_chans", "gp", "num_classes", "model_kwargs", *DATA, "label_names",
)  # fmt: skip
EXPORT = ("architecture", "num_classes", "global_pool", "model_args", "label_names", "pretrained_cfg")
CONFIGURATION = (  # what is taken of a pretrained_cfg
    "input_size", "test_input_size", "fixed_input_size", *DATA, "test_crop_pct", "num_classes", "label_names",
    "pool_size", "first_conv", "classifier", "license",
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """A network as a file describes it.

    Attributes:
        name: its name in timm.
        options: arguments of its constructor: img_size, num_classes, in_chans, global_pool where the file says them,
            and those of its architecture.
        data: how images are prepared, in timm's names, as far as the file says it.
        label_names: names of the classes, in their order or by their number, or None.
    """

    name: str
    options: dict[str, Any]
    data: dict[str, Any]
    label_names: Any


def describe_checkpoint(content: Mapping[str, Any], path: Path, model: str = "") -> Description:
    """Describe the network of a checkpoint in timm's format, ours or theirs; ``model`` is the name where another is
    meant.

    Raises:
        InputError: no name, or a field of another type than it must have, naming it.
    """
    arguments = content.get("args")
    ours = not isinstance(arguments, argparse.Namespace)
    arguments = {} if arguments is None else arguments if ours else vars(arguments)
    if not isinstance(arguments, Mapping):
        raise InputError(f"{str(path)!r}: args must be the options of a training, got {shown(arguments)}")
    stored = checked({**arguments, "arch": content.get("arch")}, path, CHECKPOINT)
    name = model or stored.get("arch") or stored.get("model")
    if not name:
        raise InputError(
            f"{str(path)!r} does not say of which network it is: give the folder of an export, or its name as model, "
            "which asvit-fast eval takes"
        )
    size = stored.get("img_size")
    if size is None and "input_size" in stored:
        size = stored["input_size"][1:]
    channels = stored.get("in_chans") or (stored["input_size"][0] if "input_size" in stored else None)
    options = {"in_chans": channels, "global_pool": stored.get("gp"), "num_classes": stored.get("num_classes")}
    if ours and takes_size(name):  # timm's training builds its networks without it
        options["img_size"] = size
    options = {key: value for key, value in options.items() if value is not None}
    options |= architecture_arguments(name, stored.get("model_kwargs", {}), f"{str(path)!r}: model_kwargs")
    data = {key: stored[key] for key in DATA if key in stored}
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        data["input_size"] = (options.get("in_chans", 3), height, width)
    return Description(name, options, data, stored.get("label_names"))


def describe_export(config: Any, path: Path) -> tuple[Description, dict[str, Any]]:
    """Describe the network of an exported folder by its config.json, and return its pretrained_cfg as far as it is
    taken.

    Raises:
        InputError: no name, or a field of another type than it must have, naming it.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{str(path)!r} must hold a JSON object, got {shown(config)}")
    stored = checked(config, path, EXPORT)
    if "architecture" not in stored:
        raise InputError(f"{str(path)!r} names no architecture; give a folder of asvit-fast export")
    inner = stored.get("pretrained_cfg", config)  # older exports of timm have one level
    configuration = checked(inner, path, CONFIGURATION)
    name = stored["architecture"]
    options = architecture_arguments(name, stored.get("model_args", {}), f"{str(path)!r}: model_args")
    classes = [part["num_classes"] for part in (options, stored, configuration) if "num_classes" in part]
    if len(set(classes)) > 1:
        raise InputError(f"{str(path)!r}: num_classes is {' and '.join(map(str, classes))}; export again")
    if classes:
        options["num_classes"] = configuration["num_classes"] = classes[0]
    if "global_pool" in stored:
        options.setdefault("global_pool", stored["global_pool"])
    if "input_size" in configuration:
        shape = configuration["input_size"]
        channels = options.setdefault("in_chans", shape[0])
        configuration["input_size"] = (channels, *shape[1:])
    labels = stored.get("label_names", configuration.get("label_names"))
    if labels is not None:
        configuration["label_names"] = labels
    return Description(name, options, {}, labels), {"architecture": name, **configuration}


def architecture_arguments(name: str, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keep the arguments that are the architecture's; those of loading are left out.

    Raises:
        InputError: an unknown network, or an argument that it does not know.
    """
    arguments = {key: value for key, value in arguments.items() if key not in LOADING and value is not None}
    parameters = constructor_parameters(name)
    unknown = [key for key in arguments if key not in parameters]
    if unknown:
        raise InputError(f"{where} has {', '.join(unknown)}, which {name} does not know; is it of another version?")
    return arguments


def constructor_parameters(name: str) -> set[str]:
    """Names of the arguments that the classes of a network's module take. Raises InputError for an unknown network."""
    module = module_of(name)
    parameters: set[str] = set()
    for value in vars(module).values():
        if not inspect.isclass(value):
            continue
        if issubclass(value, nn.Module):
            for parent in value.__mro__:
                parameters.update(inspect.signature(parent.__init__).parameters)  # type: ignore[misc]
        elif dataclasses.is_dataclass(value) and value.__module__ == module.__name__:  # of networks made by a cfg
            parameters.update(field.name for field in dataclasses.fields(value))
    return parameters - LOADING


# --------------------------------------------------------------------------- fields


def checked(content: Mapping[str, Any], path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Take these fields, each of its type; without those that are None or empty text.

    Raises InputError for another type or value, naming the field.
    """
    fields = {name: content.get(name) for name in names}
    fields = {name: value for name, value in fields.items() if value is not None and value != ""}
    for name, value in fields.items():
        if not fits(value, _FIELDS[name]):
            raise InputError(f"{str(path)!r}: {name} must be {_FIELDS[name][1]}, got {shown(value)}")
    return fields


def _are_labels(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(str(key).isdigit() and is_text(name) for key, name in value.items())
    return is_list(value, is_text)


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, Mapping) or not is_plain(value):
        return False
    return all(field[0](value[name]) for name, field in _ARGUMENTS.items() if value.get(name) is not None)


_ARGUMENTS: dict[str, Field] = {
    "num_classes": whole(0),
    "in_chans": whole(1),
    "img_size": (is_size, "pixels: a side, or height and width"),
    "global_pool": TEXT,
}
_FIELDS: dict[str, Field] = {
    **_ARGUMENTS,
    **dict.fromkeys(("arch", "model", "architecture", "gp", "license"), TEXT),
    **dict.fromkeys(
        ("input_size", "test_input_size"),
        (lambda value: is_list(value, is_positive, 3), "channels, height and width"),
    ),
    **dict.fromkeys(
        ("crop_pct", "test_crop_pct"),
        (lambda value: are_numbers([value]) and 0 < value <= 1, "a number above 0 and at most 1"),
    ),
    **dict.fromkeys(
        ("first_conv", "classifier"), (lambda value: is_text(value) or is_list(value, is_text), "a name, or several")
    ),
    **dict.fromkeys(("model_kwargs", "model_args"), (_are_arguments, "arguments of a network by their names")),
    "pretrained_cfg": (lambda value: isinstance(value, Mapping), "a JSON object"),
    "mean": (are_numbers, "a number for each channel"),
    "std": (lambda value: are_numbers(value) and min(value) > 0, "a number above 0 for each channel"),
    "crop_mode": one_of(CROP_MODES),
    "interpolation": one_of((*INTERPOLATIONS, "random")),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "pool_size": (lambda value: is_list(value, is_positive), "height and width"),
    "label_names": (_are_labels, "names of classes, in their order or by their number"),
}
