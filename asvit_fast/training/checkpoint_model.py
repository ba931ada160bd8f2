"""A network out of a file: timm's checkpoints, ours, exported folders, bare weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from timm.data import resolve_data_config
from torch import Tensor, nn

from ..backends import notify_once
from ..errors import InputError
from ..files import from_json, read_jsonl
from ..models.library import pretrained_config
from ..run_directory import TRACE
from .checkpoint import BEST, LAST, one_line, read_file, weights_of
from .description import describe_checkpoint, describe_export, takes_size
from .network import build

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True)
class CheckpointModel:
    """A network with its weights, float32, on the CPU, and what its file says about it.

    Attributes:
        model: the network.
        name: its name in timm.
        path: the file that the weights are from.
        options: arguments of its constructor.
        data: how its images are prepared, in timm's names, as far as the file says it.
        label_names: names of its classes, in their order or by their number, or None.
    """

    model: nn.Module
    name: str
    path: Path
    options: dict[str, Any]
    data: dict[str, Any]
    label_names: Any = None

    def data_config(
        self,
        img_size: int | tuple[int, int] | None = None,
        crop_pct: float | None = None,
        interpolation: str = "",
        crop_mode: str = "",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> dict[str, Any]:
        """How images are prepared: timm's input_size (channels, height, width), mean, std, crop_pct, crop_mode,
        interpolation. What is given counts, then what the file says, then the network's default.

        Raises:
            InputError: means or standard deviations for another number of channels.
        """
        given = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode, "mean": mean, "std": std}
        known = {**self.data, **{name: value for name, value in given.items() if value}}
        channels = getattr(self.model, "in_chans", self.options.get("in_chans", 3))
        known["in_chans"] = channels
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
            known["input_size"] = (channels, height, width)
        for name in ("mean", "std"):
            if len(known.get(name, (0,))) not in (1, channels):
                raise InputError(f"{name} must be one number or {channels}, one for each channel, got {known[name]}")
        if min(known.get("std", (1,))) <= 0:
            raise InputError(f"std must be numbers above 0, got {known['std']}")
        config = resolve_data_config(known, model=self.model, use_test_size=True)
        config |= {name: _for_channels(config[name], channels) for name in ("mean", "std")}
        shape = (channels, *config["input_size"][1:])
        return {**config, "input_size": shape, "interpolation": config["interpolation"].replace("random", "bicubic")}

    def fit_to(self, img_size: tuple[int, int]) -> None:
        """Resize a network that is made for one size of images, where it is another: timm chooses new windows then."""
        model: Any = self.model
        if not takes_size(self.name) or not hasattr(model, "set_input_size"):
            return
        own = self.options.get("img_size") or model.pretrained_cfg["input_size"][1:]
        own = (own, own) if isinstance(own, int) else tuple(own)
        if own != img_size:
            model.set_input_size(img_size=img_size)


def build_from_checkpoint(
    path: str | Path,
    model: str = "",
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    use_ema: bool = False,
) -> CheckpointModel:
    """The network of a checkpoint with its weights. No code of the file is run, and nothing that it names is opened:
    what is taken of it are weights, arguments of the architecture and preprocessing.

    Args:
        path: a checkpoint in timm's format; a folder of ``asvit-fast export``; the folder of a training (its best
            checkpoint, else its last); a file of weights alone, .safetensors or .pth, which needs ``model``.
        model: timm's name of the network, where the checkpoint says none or another is meant.
        model_kwargs: further arguments of the network, before those of the checkpoint.
        num_classes: number of outputs, where neither the checkpoint nor its classifier says it.
        use_ema: the moving average of the weights.

    Raises:
        InputError: no such file, not a checkpoint, fields of another type than they must have, no or an unknown model,
            arguments that the network does not know, weights of another network, no average.
    """
    path = Path(path)
    if path.name == WEIGHTS_FILE and is_export(path.parent) and not model:
        path = path.parent
    if is_export(path):
        if model or model_kwargs or num_classes is not None:
            raise InputError(f"{str(path)!r} says which network it is; leave out model, its arguments and classes")
        return _exported(path, use_ema)
    path = _file_of(path)
    content = read_file(path)
    said = describe_checkpoint(content, path, model)
    weights = weights_of(content, path, use_ema)
    given = {} if num_classes is None else {"num_classes": num_classes}
    options = {**_classes_of(weights, said.name), **said.options, **given, **(model_kwargs or {})}
    network = build(said.name, options)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"the weights of {str(path)!r} do not fit {said.name}: {one_line(error)}") from error
    return CheckpointModel(network, said.name, path, options, said.data, said.label_names)


def _classes_of(weights: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """The number of outputs that the classifier has, in arguments of the network: not all checkpoints say it."""
    classifier = pretrained_config(name).get("classifier") or ()
    for head in (classifier,) if isinstance(classifier, str) else classifier:
        weight = weights.get(f"{head}.weight")
        if weight is not None and weight.ndim >= 2:
            return {"num_classes": weight.shape[0]}
    return {}


def is_export(path: Path) -> bool:
    """Whether it is a folder of a network's configuration and weights."""
    return all((path / name).is_file() for name in (WEIGHTS_FILE, CONFIG_FILE))


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One for each, as timm's loaders adapt them: their average where there are others."""
    return tuple(values) if len(values) == channels else (fmean(values),) * channels


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a file or folder")
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            if name == LAST and _was_validated(path):
                notify_once(path, f"{path / BEST} is lost: the weights of the last epoch, {LAST}, take its place")
            return path / name
    raise InputError(f"folder {str(path)!r} holds no {', no '.join((BEST, LAST))} and no export; give a checkpoint")


def _was_validated(run: Path) -> bool:
    trace = run / TRACE
    return trace.is_file() and any(row.get("top1") is not None for row in read_jsonl(trace))


def _exported(path: Path, use_ema: bool) -> CheckpointModel:
    if use_ema:
        raise InputError(f"the export {str(path)!r} holds no moving average of the weights; leave out use_ema")
    config = path / CONFIG_FILE
    try:
        content = from_json(config.read_bytes())
    except InputError as error:
        raise InputError(f"{str(config)!r}: {error}; export again") from None
    said, configuration = describe_export(content, config)
    weights = {"pretrained": True, "pretrained_cfg": {**configuration, "file": str(path / WEIGHTS_FILE)}}
    network: Any = build(said.name, {**said.options, **weights})
    network.pretrained_cfg.pop("file")
    return CheckpointModel(network, said.name, path / WEIGHTS_FILE, said.options, said.data, said.label_names)
