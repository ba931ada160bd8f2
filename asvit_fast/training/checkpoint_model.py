"""A network out of a file: timm's checkpoints, ours, exported folders, bare weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import nn

from ..errors import InputError
from .checkpoint import BEST, LAST, one_line, read_file, weights_of
from .network import build, takes_size


@dataclass(frozen=True)
class CheckpointModel:
    """A network with its weights, float32, on the CPU, and what its checkpoint says about it.

    Attributes:
        model: the network.
        name: its name in timm.
        path: the file that the weights are from.
        arguments: the checkpoint's "args" as a dict: img_size, mean, std, crop_pct, interpolation and more, or empty.
    """

    model: nn.Module
    name: str
    path: Path
    arguments: dict[str, Any]

    def data_config(
        self, img_size: int | tuple[int, int] | None = None, crop_pct: float | None = None, interpolation: str = ""
    ) -> dict[str, Any]:
        """How images are prepared: timm's input_size (channels, height, width), mean, std, crop_pct, crop_mode,
        interpolation. What is given counts, then what the checkpoint says, then the network's default."""
        given = {"crop_pct": crop_pct, "interpolation": interpolation}
        known = {**self.arguments, **{name: value for name, value in given.items() if value}}
        side = img_size or known.pop("img_size", None)
        if side is not None:
            height, width = (side, side) if isinstance(side, int) else side
            known |= {"img_size": None, "input_size": (known.get("in_chans") or 3, height, width)}
        config = resolve_data_config(known, model=self.model, use_test_size=True)
        return {**config, "interpolation": config["interpolation"].replace("random", "bicubic")}


def build_from_checkpoint(
    path: str | Path,
    model: str = "",
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    use_ema: bool = False,
) -> CheckpointModel:
    """The network of a checkpoint with its weights. No code of the file is run.

    Args:
        path: a checkpoint in timm's format; a folder of ``asvit-fast export``; the folder of a training (its best
            checkpoint, else its last); a file of weights alone, .safetensors or .pth, which needs ``model``.
        model: timm's name of the network, where the checkpoint says none or another is meant.
        model_kwargs: further arguments of the network, before those of the checkpoint.
        num_classes: number of outputs, where the checkpoint does not say it.
        use_ema: the moving average of the weights.

    Raises:
        InputError: no such file, not a checkpoint, no or an unknown model, weights of another network, no average.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        return _exported(path, use_ema)
    path = _file_of(path)
    content = read_file(path)
    arguments = _arguments(content)
    name = model or content.get("arch") or arguments.get("model")
    if not isinstance(name, str):
        raise InputError(f"{str(path)!r} does not say of which network it is; give its name as model")
    weights = weights_of(content, path, use_ema)
    options = {**_options(content, name, arguments), **(model_kwargs or {})}
    classes = num_classes or arguments.get("num_classes")
    network = build(name, {**({} if classes is None else {"num_classes": classes}), **options})
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"the weights of {str(path)!r} do not fit {name}: {one_line(error)}") from error
    return CheckpointModel(network, name, path, arguments)


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a file or folder")
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise InputError(f"folder {str(path)!r} holds no {', no '.join((BEST, LAST))} and no export; give a checkpoint")


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    arguments = content.get("args") or {}
    return dict(vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments)


def _options(content: Mapping[str, Any], name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the network's constructor, but for the number of classes."""
    options = {"in_chans": arguments.get("in_chans"), "global_pool": arguments.get("gp")}
    if isinstance(content.get("args"), Mapping) and takes_size(name):
        options["img_size"] = arguments.get("img_size")  # timm's training builds its networks without it
    known = {key: value for key, value in options.items() if value is not None}
    return {**known, **(arguments.get("model_kwargs") or {})}


def _exported(path: Path, use_ema: bool) -> CheckpointModel:
    if use_ema:
        raise InputError(f"the export {str(path)!r} holds no moving average of the weights; leave out use_ema")
    try:
        name = json.loads((path / "config.json").read_bytes())["architecture"]
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{str(path)!r} is not an export that timm loads: {one_line(error)}") from error
    return CheckpointModel(model, name, path / "model.safetensors", {})
