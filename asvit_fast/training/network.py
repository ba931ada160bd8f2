"""The network that is trained, and what a checkpoint must say of it so that it can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from .. import models  # noqa: F401  registers "asvit" with timm
from ..errors import InputError
from ..topology import Topology

What = str | Topology | nn.Module


def create_network(
    what: What,
    num_classes: int,
    img_size: int | tuple[int, int],
    model_kwargs: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    initial_checkpoint: str = "",
) -> tuple[nn.Module, dict[str, Any]]:
    """The network and its description: {"model", "num_classes", "img_size", "model_kwargs"} and how images are read
    ("mean", "std", "crop_pct", "interpolation").

    Args:
        what: a topology or its text, a name that timm knows, or a network, which is taken as it is.
        model_kwargs: further arguments of its constructor.
        initial_checkpoint: weights to start from, a file in timm's format.

    Raises:
        InputError: an unknown name, arguments that the network does not take, a network for other classes.
    """
    if isinstance(what, nn.Module):
        _check_classes(what, num_classes)
        name = getattr(what, "pretrained_cfg", {}).get("architecture") or type(what).__name__
        return what, {"model": name, **_describe(what, num_classes, img_size, {})}
    options = dict(model_kwargs or {})
    if isinstance(what, Topology) or "|" in what:
        options["topology"] = str(Topology.parse(what))
        what = "asvit"
    if _takes_size(what):
        options.setdefault("img_size", img_size)
    described = {name: value for name, value in options.items() if name != "img_size"}
    try:
        model = timm.create_model(
            what, num_classes=num_classes, drop_path_rate=drop_path, checkpoint_path=initial_checkpoint, **options
        )
    except TypeError as error:
        raise InputError(f"{what} does not take these arguments: {error}") from error
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(f"{what} cannot start from {initial_checkpoint!r}: {' '.join(str(error).split())}") from error
    return model, {"model": what, **_describe(model, num_classes, img_size, described)}


def pixel_statistics(what: What) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels of each channel that the network is made for."""
    if isinstance(what, nn.Module):
        config = resolve_data_config({}, model=what)
    else:
        name = "asvit" if isinstance(what, Topology) or "|" in what else what
        config = resolve_data_config({}, pretrained_cfg=_known(name).to_dict())
    return tuple(config["mean"]), tuple(config["std"])


def _known(name: str) -> PretrainedCfg:
    """What timm knows of a model."""
    if not timm.is_model(name):
        raise InputError(f"{name!r} is neither a topology nor a model of timm; see timm.list_models()")
    return timm.get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg()


def _takes_size(name: str) -> bool:
    """Networks whose weights depend on the size of the image; others take any."""
    return name.partition(".")[0].startswith("asvit") or _known(name).fixed_input_size


def _check_classes(model: nn.Module, num_classes: int) -> None:
    own = getattr(model, "num_classes", num_classes)
    if own != num_classes:
        raise InputError(
            f"the network has {own} classes, the data {num_classes}; model.reset_classifier({num_classes})"
        )


def _describe(
    model: nn.Module, num_classes: int, img_size: int | tuple[int, int], model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    config = resolve_data_config({}, model=model)
    return {
        "num_classes": num_classes,
        "img_size": img_size if isinstance(img_size, int) else list(img_size),
        "model_kwargs": model_kwargs,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
