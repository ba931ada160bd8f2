"""The network that is trained, and what a checkpoint must say of it so that it can be built again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from ..backends import notify_once
from ..errors import InputError
from ..models import AsViT  # (and "asvit" is registered with timm)
from ..models.state_dict import fit_state_dict
from ..topology import Topology
from .checkpoint import one_line, read_file, weights_of

What = str | Topology | nn.Module
BESIDES = ("img_size", "num_classes", "pretrained")  # arguments that a description has elsewhere, or not at all
TIMMS_FIT = "checkpoint_filter_fn"  # beside each model of timm: old names and other sizes made to fit


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
    if takes_size(what):
        options.setdefault("img_size", img_size)
    options["num_classes"] = num_classes
    try:
        model = build(what, {"drop_path_rate": drop_path, **options})
    except InputError as error:
        if drop_path or "drop_path_rate" not in str(error):
            raise
        model = build(what, options)  # it has no stochastic depth, and none is wanted
    if initial_checkpoint:
        start_from(model, initial_checkpoint)
    described = {name: value for name, value in options.items() if name not in BESIDES}
    return model, {"model": what, **_describe(model, num_classes, img_size, described)}


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A network of timm by its name. Raises InputError for an unknown one, or arguments that it does not take."""
    _known(name)
    try:
        return timm.create_model(name, **options)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{name} cannot be made with these arguments: {one_line(error)}") from error


def start_from(model: Any, path: str) -> None:
    """Weights of a checkpoint into a network, embeddings resized as timm does; a classifier for other classes starts
    afresh, which is said once.

    Raises:
        InputError: no such file, or weights of another network.
    """
    weights = weights_of(read_file(path), path)
    fit = fit_state_dict if isinstance(model, AsViT) else vars(sys.modules[type(model).__module__]).get(TIMMS_FIT)
    own = model.state_dict()
    try:
        weights = fit(weights, model) if fit else weights
        heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        classifier = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
        others = [n for n in weights if n.startswith(classifier) and n in own and weights[n].shape != own[n].shape]
        if others:
            notify_once(("classifier", path), f"{path} is of other classes: {', '.join(others)} start afresh")
        model.load_state_dict({**weights, **{name: own[name] for name in others}})
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"the weights of {path!r} do not fit {type(model).__name__}: {one_line(error)}") from error


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


def takes_size(name: str) -> bool:
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
