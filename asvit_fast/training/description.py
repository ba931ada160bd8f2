"""What a file says of its network, field by field and checked: files come from anywhere.

Only what an architecture and its preprocessing need is taken. Everything that says where weights are, or how timm loads
them, is left in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg
from torch import nn

from ..errors import InputError
from ..models.library import module_of, takes_size
from ..recipe import CROP_MODES, INTERPOLATIONS, are_numbers

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
    label_names: Any = None


def describe_checkpoint(content: Mapping[str, Any], path: Path, model: str = "") -> Description:
    """Of a checkpoint in timm's format, ours or theirs; ``model`` is the name where another is meant.

    Raises:
        InputError: no name, or a field of another type than it must have, naming it.
    """
    arguments = content.get("args")
    ours = not isinstance(arguments, argparse.Namespace)
    arguments = {} if arguments is None else arguments if ours else vars(arguments)
    if not isinstance(arguments, Mapping):
        raise InputError(f"{str(path)!r}: args must be the options of a training, got {_shown(arguments)}")
    said = checked({**arguments, "arch": content.get("arch")}, path, CHECKPOINT)
    name = model or said.get("arch") or said.get("model")
    if not name:
        raise InputError(
            f"{str(path)!r} does not say of which network it is: give the folder of an export, or its name as model, "
            "which asvit-fast eval takes"
        )
    size = said.get("img_size")
    if size is None and "input_size" in said:
        size = said["input_size"][1:]
    channels = said.get("in_chans") or (said["input_size"][0] if "input_size" in said else None)
    options = {"in_chans": channels, "global_pool": said.get("gp"), "num_classes": said.get("num_classes")}
    if ours and takes_size(name):  # timm's training builds its networks without it
        options["img_size"] = size
    options = {key: value for key, value in options.items() if value is not None}
    options |= architecture_arguments(name, said.get("model_kwargs", {}), f"{str(path)!r}: model_kwargs")
    data = {key: said[key] for key in DATA if key in said}
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        data["input_size"] = (options.get("in_chans", 3), height, width)
    return Description(name, options, data, said.get("label_names"))


def describe_export(config: Any, path: Path) -> tuple[Description, dict[str, Any]]:
    """Of the config.json of an exported folder, and its pretrained_cfg as far as it is taken.

    Raises:
        InputError: no name, or a field of another type than it must have, naming it.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{str(path)!r} must hold a JSON object, got {_shown(config)}")
    said = checked(config, path, EXPORT)
    if "architecture" not in said:
        raise InputError(f"{str(path)!r} names no architecture; give a folder of asvit-fast export")
    inner = said.get("pretrained_cfg", config)  # older exports of timm have one level
    configuration = checked(inner, path, CONFIGURATION)
    name = said["architecture"]
    options = architecture_arguments(name, said.get("model_args", {}), f"{str(path)!r}: model_args")
    classes = [part["num_classes"] for part in (options, said, configuration) if "num_classes" in part]
    if len(set(classes)) > 1:
        raise InputError(f"{str(path)!r}: num_classes is {' and '.join(map(str, classes))}; export again")
    if classes:
        options["num_classes"] = configuration["num_classes"] = classes[0]
    if "global_pool" in said:
        options.setdefault("global_pool", said["global_pool"])
    if "input_size" in configuration:
        shape = configuration["input_size"]
        channels = options.setdefault("in_chans", shape[0])
        configuration["input_size"] = (channels, *shape[1:])
    labels = said.get("label_names", configuration.get("label_names"))
    if labels is not None:
        configuration["label_names"] = labels
    return Description(name, options, {}, labels), {"architecture": name, **configuration}


def architecture_arguments(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of ``given`` that are the architecture's; those of loading are left out.

    Raises:
        InputError: an unknown network, or an argument that it does not know.
    """
    arguments = {key: value for key, value in given.items() if key not in LOADING and value is not None}
    known = constructor_parameters(name)
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise InputError(f"{where} has {', '.join(unknown)}, which {name} does not know; is it of another version?")
    return arguments


def constructor_parameters(name: str) -> set[str]:
    """Names of the arguments that the classes of a network's module take. Raises InputError for an unknown network."""
    module = module_of(name)
    found: set[str] = set()
    for value in vars(module).values():
        if not inspect.isclass(value):
            continue
        if issubclass(value, nn.Module):
            for parent in value.__mro__:
                found.update(inspect.signature(parent.__init__).parameters)  # type: ignore[misc]
        elif dataclasses.is_dataclass(value) and value.__module__ == module.__name__:  # of networks made by a cfg
            found.update(field.name for field in dataclasses.fields(value))
    return found - LOADING


# --------------------------------------------------------------------------- fields


def checked(content: Mapping[str, Any], path: Path, names: Iterable[str]) -> dict[str, Any]:
    """These fields, each of its type; without those that are None or empty text.

    Raises InputError for another type or value, naming the field.
    """
    found = {}
    for name in names:
        value, (holds, expected) = content.get(name), _FIELDS[name]
        if value is None or (isinstance(value, str) and not value):
            continue
        try:
            fits = holds(value)
        except (RecursionError, OverflowError):  # a list inside itself, a number beyond any float
            fits = False
        if not fits:
            raise InputError(f"{str(path)!r}: {name} must be {expected}, got {_shown(value)}")
        found[name] = value
    return found


def is_size(value: Any) -> bool:
    """A side, or height and width, in pixels."""
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    return len(sides) == 2 and all(map(_is_positive_integer, sides))


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested, or with more digits, than Python prints
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _is_positive_integer(value: Any) -> bool:
    return _is_integer(value) and value >= 1


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_positive_integer, value))


def _is_part(value: Any) -> bool:
    return are_numbers([value]) and 0 < value <= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


def _are_labels(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(str(key).isdigit() and isinstance(name, str) for key, name in value.items())
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _are_sides(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_positive_integer, value))


def _is_plain(value: Any) -> bool:
    """Numbers, text and lists and mappings of them: what JSON holds."""
    if isinstance(value, Mapping):
        return all(map(_is_text, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, Mapping) or not _is_plain(value):
        return False
    return all(holds(value[name]) for name, (holds, _) in _ARGUMENTS.items() if value.get(name) is not None)


def _one_of(choices: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _expected(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(choices)


Field = tuple[Callable[[Any], bool], str]
_ARGUMENTS: dict[str, Field] = {
    "num_classes": (_is_count, "a whole number of at least 0"),
    "in_chans": (_is_positive_integer, "a whole number of at least 1"),
    "img_size": (is_size, "pixels: a side, or height and width"),
    "global_pool": (_is_text, "text"),
}
_MODES, _WAYS = (*CROP_MODES,), (*INTERPOLATIONS, "random")
_FIELDS: dict[str, Field] = {
    **_ARGUMENTS,
    **dict.fromkeys(("arch", "model", "architecture", "gp", "license"), (_is_text, "text")),
    **dict.fromkeys(("input_size", "test_input_size"), (_is_shape, "channels, height and width")),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), (_is_part, "a number above 0 and at most 1")),
    **dict.fromkeys(("first_conv", "classifier"), (_are_names, "a name, or several")),
    **dict.fromkeys(("model_kwargs", "model_args"), (_are_arguments, "arguments of a network by their names")),
    "pretrained_cfg": (lambda value: isinstance(value, Mapping), "a JSON object"),
    "mean": (are_numbers, "a number for each channel"),
    "std": (lambda value: are_numbers(value) and min(value) > 0, "a number above 0 for each channel"),
    "crop_mode": (_one_of(_MODES), _expected(_MODES)),
    "interpolation": (_one_of(_WAYS), _expected(_WAYS)),
    "fixed_input_size": (lambda value: isinstance(value, bool), "true or false"),
    "pool_size": (_are_sides, "height and width"),
    "label_names": (_are_labels, "names of classes, in their order or by their number"),
}
