"""The network that is trained, and what a checkpoint must say of it so that it can be built again."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import nn

from ..backends import notify_once
from ..errors import InputError
from ..models import AsViT
from ..models.library import check_known, create_by_name, pretrained_config, takes_size
from ..models.state_dict import fit_state_dict
from ..nn import FeatScale
from ..recipe import Recipe
from ..topology import Topology
from .checkpoint import one_line, read_file, weights_of
from .description import LOADING, constructor_parameters

What = str | Topology | nn.Module
TIMMS_FIT = "checkpoint_filter_fn"  # beside each model of timm: old names and other sizes made to fit


def create_network(
    what: What,
    num_classes: int,
    img_size: int | tuple[int, int],
    model_kwargs: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    initial_checkpoint: str = "",
) -> tuple[nn.Module, dict[str, Any]]:
    """The network and its description, from which it can be built again: {"model", "num_classes", "img_size",
    "model_kwargs"}.

    Args:
        what: a topology or its text, a name that timm or torchvision knows, or a network, which is taken as it is.
        model_kwargs: further arguments of its constructor.
        initial_checkpoint: weights to start from, a file in timm's format.

    Raises:
        InputError: an unknown name, arguments that the network does not take, a network for other classes.
    """
    if isinstance(what, nn.Module):
        _check_classes(what, num_classes)
        name, options = constructor_arguments(what)
        return what, _description(name, num_classes, img_size, options)
    options = dict(model_kwargs or {})
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
    """A network of timm or torchvision by its name. Raises InputError for an unknown one, or arguments that it does
    not take."""
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


def channels_of(what: What, model_kwargs: Mapping[str, Any] | None) -> int:
    """Channels of the images that the network takes."""
    given = getattr(what, "in_chans", None) if isinstance(what, nn.Module) else (model_kwargs or {}).get("in_chans")
    return 3 if given is None else given


def pixel_statistics(what: What, recipe: Recipe, channels: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, one for each channel: the recipe's, or those that the network is made
    for, averaged where it is made for another number of channels.

    Raises:
        InputError: a recipe with another number of values.
    """
    if isinstance(what, nn.Module):
        config = resolve_data_config({}, model=what)
    else:
        name = "asvit" if isinstance(what, Topology) or "|" in what else what
        check_known(name)
        config = resolve_data_config({}, pretrained_cfg=pretrained_config(name))
    return _each("mean", recipe.mean, config, channels), _each("std", recipe.std, config, channels)


def _each(name: str, given: tuple[float, ...] | None, config: Mapping[str, Any], channels: int) -> tuple[float, ...]:
    if given is not None and len(given) not in (1, channels):
        raise InputError(f"{name} must be one number or {channels}, one for each channel, got {len(given)}")
    values = tuple(given or config[name])
    return values if len(values) == channels else (fmean(values),) * channels


def _check_classes(model: nn.Module, num_classes: int) -> None:
    own = getattr(model, "num_classes", num_classes)
    if own != num_classes:
        raise InputError(
            f"the network has {own} classes, the data {num_classes}; model.reset_classifier({num_classes})"
        )


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
