"""Networks: made for a training and described so that they can be made again, or out of a file with its weights."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..backends import notify_once
from ..errors import InputError, one_line
from ..files import from_json, read_jsonl
from ..models import AsViT
from ..models.library import check_known, create_by_name, pretrained_config, takes_size
from ..models.state_dict import fit_state_dict
from ..nn import FeatScale
from ..recipe import Recipe, per_channel
from ..run_directory import TRACE, accuracy
from ..topology import Topology
from .checkpoint import BEST, LAST, read_file, weights_of
from .description import LOADING, Description, constructor_parameters, describe_checkpoint, describe_export

What = str | Topology | nn.Module
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"  # of an exported folder
TIMMS_FIT = "checkpoint_filter_fn"  # beside each model of timm: old names and other sizes made to fit


def create_network(
    what: What,
    num_classes: int,
    img_size: int | tuple[int, int],
    model_kwargs: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    initial_checkpoint: str = "",
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the network and its description, from which it can be built again: {"model", "num_classes", "img_size",
    "model_kwargs"}.

    Args:
        what: a topology or its text, a name that timm or torchvision knows, or a network, which is taken as it is.
        model_kwargs: further arguments of its constructor.
        initial_checkpoint: weights to start from, a file in timm's format or the folder of a training.

    Raises:
        InputError: an unknown name, arguments that the network does not take, a network for other classes.
    """
    if isinstance(what, nn.Module):
        own = getattr(what, "num_classes", num_classes)
        if own != num_classes:
            raise InputError(
                f"the network has {own} classes, the data {num_classes}; model.reset_classifier({num_classes})"
            )
        name, options = constructor_arguments(what)
        return what, _description(name, num_classes, img_size, options)
    options = dict(model_kwargs or {})
    if not isinstance(what, (str, Topology)):
        raise InputError(f"a network is a topology, a name or a module, got {type(what).__name__}")
    if isinstance(what, Topology) or "|" in what:
        if "topology" in options:
            raise InputError(
                f"the topology is given twice: {what}, and as an argument {options['topology']}; leave one out"
            )
        options["topology"] = str(Topology.parse(what))
        what = "asvit"
    if takes_size(what):
        options.setdefault("img_size", img_size)
    options["num_classes"] = num_classes
    try:
        model = build(what, {"drop_path_rate": drop_path, **options})
    except InputError as error:
        if "drop_path_rate" not in str(error):
            raise
        if drop_path:
            raise InputError(f"{what} has no stochastic depth of timm's kind: leave it out with drop_path 0") from error
        model = build(what, options)  # it has no stochastic depth, and none is wanted
    if initial_checkpoint:
        start_from(model, initial_checkpoint)
    return model, _description(what, num_classes, img_size, options)


def constructor_arguments(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds such a network, as far as it says so (from timm 1.0.30 on)."""
    if isinstance(model, AsViT):
        first: Any = model.stages[0]
        attention = first.blocks[0].attn
        return "asvit", {
            "topology": str(model.topology),
            "img_size": model.img_size,
            "num_classes": model.num_classes,
            "in_chans": model.in_chans,
            "global_pool": model.global_pool,
            "pos_embed": "none" if model.pos_embed is None else "absolute",
            "norm": "layer" if model.has_norms else "identity",
            "window_size": model.window_size,
            "attn_scale": attention.attn_scale is not None,
            "feat_scale": isinstance(attention.feat_scale, FeatScale),
        }
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    arguments = {key: _plain(value) for key, value in getattr(model, "_model_args", {}).items() if key not in LOADING}
    return name, arguments


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Make a network of timm or torchvision by its name. Raises InputError for an unknown one, or arguments that it
    does not take."""
    try:
        return create_by_name(name, **options)
    except InputError:
        raise
    except Exception as error:  # whatever a constructor makes of an argument that it does not expect
        hint = _did_you_mean(name, error)
        raise InputError(f"{name} cannot be made with these arguments: {one_line(error)}{hint}") from error


def _did_you_mean(name: str, error: Exception) -> str:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    close = difflib.get_close_matches(unknown[1], constructor_parameters(name), 1) if unknown else []
    return f" (did you mean {close[0]}?)" if close else ""


def start_from(model: Any, path: str) -> None:
    """Load weights of a checkpoint into a network, embeddings resized as timm does; a classifier for other classes
    starts afresh, which warns once, and a network without classes leaves it out.

    Raises:
        InputError: no such file, or weights of another network.
    """
    path = str(checkpoint_file(Path(path)))
    weights = weights_of(read_file(path), path)
    fit = fit_state_dict if isinstance(model, AsViT) else vars(sys.modules[type(model).__module__]).get(TIMMS_FIT)
    own = model.state_dict()
    try:
        weights = fit(weights, model) if fit else weights
        classifier = tuple(f"{name}." for name in _classifier(getattr(model, "pretrained_cfg", {})))
        if getattr(model, "num_classes", None) == 0:
            weights = {name: value for name, value in weights.items() if name in own or not name.startswith(classifier)}
        others = [n for n in weights if n.startswith(classifier) and n in own and weights[n].shape != own[n].shape]
        if others:
            notify_once(("classifier", path), f"{path} is of other classes: {', '.join(others)} start afresh")
        model.load_state_dict({**weights, **{name: own[name] for name in others}})
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"the weights of {path!r} do not fit {type(model).__name__}: {one_line(error)}") from error


def channels_of(what: What, model_kwargs: Mapping[str, Any] | None) -> int:
    """Channels of the images that the network takes."""
    own = getattr(what, "in_chans", None) if isinstance(what, nn.Module) else (model_kwargs or {}).get("in_chans")
    return 3 if own is None else own


def pixel_statistics(what: What, recipe: Recipe, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels: the recipe's, or those that the network is made for, of which
    ``Reader`` makes one for each channel.

    Raises:
        InputError: a recipe with another number of values.
    """
    if isinstance(what, nn.Module):
        config = resolve_data_config({}, model=what)
    else:
        name = "asvit" if isinstance(what, Topology) or "|" in what else what
        check_known(name)
        config = resolve_data_config({}, pretrained_cfg=pretrained_config(name))
    for name, values in (("mean", recipe.mean), ("std", recipe.std)):
        _check_channels(name, values, channels)
    return recipe.mean or config["mean"], recipe.std or config["std"]


def _check_channels(name: str, values: Any, channels: int) -> None:
    if values is not None and len(values) not in (1, channels):
        raise InputError(f"{name} must be one number or {channels}, one for each channel, got {len(values)}")


def _classifier(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the layers of a network that give its classes, by its configuration."""
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _description(
    name: str, num_classes: int, img_size: int | tuple[int, int], options: Mapping[str, Any]
) -> dict[str, Any]:
    elsewhere = {*LOADING, "num_classes"}
    if to_2tuple(options.get("img_size", img_size)) == to_2tuple(img_size):
        elsewhere.add("img_size")  # else the network is made for images of another size than it sees
    return {
        "model": name,
        "num_classes": num_classes,
        "img_size": img_size if isinstance(img_size, int) else list(img_size),
        "model_kwargs": {key: _plain(value) for key, value in options.items() if key not in elsewhere},
    }


def _plain(value: Any) -> Any:
    """As a checkpoint can hold it. A class or function becomes its name: it cannot be built again from a file, which a
    constructor that is given its name says."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --------------------------------------------------------------------------- out of a file


@dataclass(frozen=True)
class CheckpointModel(Description):
    """A network with its weights, float32, on the CPU, and what its file says about it.

    Attributes:
        model: the network.
        path: the file that the weights are from.
    """

    model: nn.Module
    path: Path

    def data_config(
        self,
        img_size: int | tuple[int, int] | None = None,
        crop_pct: float | None = None,
        interpolation: str = "",
        crop_mode: str = "",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> dict[str, Any]:
        """Say how images are prepared: timm's input_size (channels, height, width), mean, std, crop_pct, crop_mode,
        interpolation. The arguments count, then what the file says, then the network's default.

        Raises:
            InputError: means or standard deviations for another number of channels.
        """
        options: dict[str, Any] = {
            "crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": crop_mode, "mean": mean, "std": std,
        }  # fmt: skip
        options = {**self.data, **{name: value for name, value in options.items() if value}}
        channels = getattr(self.model, "in_chans", self.options.get("in_chans", 3))
        options["in_chans"] = channels
        if img_size is not None:
            options["input_size"] = (channels, *to_2tuple(img_size))
        for name in ("mean", "std"):
            _check_channels(name, options.get(name), channels)
        if min(options.get("std", (1,))) <= 0:
            raise InputError(f"std must be numbers above 0, got {options['std']}")
        config = resolve_data_config(options, model=self.model, use_test_size=True)
        return {
            **config,
            **{name: per_channel(config[name], channels) for name in ("mean", "std")},
            "input_size": (channels, *config["input_size"][1:]),
            "interpolation": config["interpolation"].replace("random", "bicubic"),
        }

    def fit_to(self, img_size: tuple[int, int]) -> None:
        """Resize a network that is made for one size of images, where it is another: timm chooses new windows then."""
        model: Any = self.model
        if not takes_size(self.name) or not hasattr(model, "set_input_size"):
            return
        own = self.options.get("img_size") or model.pretrained_cfg["input_size"][1:]
        if tuple(to_2tuple(own)) != img_size:
            model.set_input_size(img_size=img_size)


def build_from_checkpoint(
    path: str | Path,
    model: str = "",
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    use_ema: bool = False,
) -> CheckpointModel:
    """Make the network of a checkpoint with its weights. No code of the file is run, and nothing that it names is
    opened: what is taken of it are weights, arguments of the architecture and preprocessing.

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
    path = checkpoint_file(path)
    content = read_file(path)
    if isinstance(content.get("args"), Mapping) and "detector" in content["args"]:
        raise InputError(f"{str(path)!r} is a detector's, not a classifier's; asvit-fast detect eval and show take it")
    stored = describe_checkpoint(content, path, model)
    weights = weights_of(content, path, use_ema)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    options = {**_classes_of(weights, stored.name), **stored.options, **classes, **(model_kwargs or {})}
    network = build(stored.name, options)
    try:
        network.load_state_dict(weights)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InputError(f"the weights of {str(path)!r} do not fit {stored.name}: {one_line(error)}") from error
    return CheckpointModel(stored.name, options, stored.data, stored.label_names, network, path)


def _classes_of(weights: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """The number of outputs that the classifier has, in arguments of the network: not all checkpoints say it."""
    for head in _classifier(pretrained_config(name)):
        weight = weights.get(f"{head}.weight")
        if weight is not None and weight.ndim >= 2:
            return {"num_classes": weight.shape[0]}
    return {}


def is_export(path: Path) -> bool:
    """Return whether it is a folder of a network's configuration and weights."""
    return all((path / name).is_file() for name in (WEIGHTS_FILE, CONFIG_FILE))


def checkpoint_file(path: Path) -> Path:
    """The file itself, or of the folder of a training its best checkpoint, else its last. Raises InputError."""
    if not path.exists():
        raise InputError(f"checkpoint {str(path)!r} does not exist; give a file or folder")
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            trace = read_jsonl(path / TRACE) if name == LAST else []
            if any(accuracy(row) is not None for row in trace):
                notify_once(path, f"{path / BEST} is lost: the weights of the last epoch, {LAST}, take its place")
            return path / name
    raise InputError(f"folder {str(path)!r} holds no {', no '.join((BEST, LAST))} and no export; give a checkpoint")


def _exported(path: Path, use_ema: bool) -> CheckpointModel:
    if use_ema:
        raise InputError(f"the export {str(path)!r} holds no moving average of the weights; leave out use_ema")
    config = path / CONFIG_FILE
    try:
        content = from_json(config.read_bytes())
    except InputError as error:
        raise InputError(f"{str(config)!r}: {error}; export again") from None
    stored, configuration = describe_export(content, config)
    weights = {"pretrained": True, "pretrained_cfg": {**configuration, "file": str(path / WEIGHTS_FILE)}}
    network: Any = build(stored.name, {**stored.options, **weights})
    network.pretrained_cfg.pop("file")
    return CheckpointModel(**vars(stored), model=network, path=path / WEIGHTS_FILE)
