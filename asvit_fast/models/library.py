"""Networks by name: timm's (ours among them), and torchvision's for classification. timm's come first."""

from __future__ import annotations

import difflib
import sys
from types import ModuleType
from typing import Any

import timm
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import model_entrypoint
from torch import nn

from ..errors import InputError
from . import variants  # noqa: F401  (it registers ours with timm)

_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}  # of torchvision's networks


def is_known(name: str) -> bool:
    """Whether timm or torchvision has a network of this name."""
    return timm.is_model(name) or name in _torchvisions()


def check_known(name: str) -> None:
    """Raise InputError, with the names that are close, unless timm or torchvision has a network of this name."""
    if not is_known(name):
        names = list(dict.fromkeys([*timm.list_models(), *_torchvisions()]))
        close = difflib.get_close_matches(name, names, 3) or [one for one in names if name and one.startswith(name)][:3]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"{name!r} is neither a topology nor a model of timm or torchvision; {hint}")


def create_by_name(name: str, **options: Any) -> nn.Module:
    """The network of this name with fresh weights. Raises InputError for an unknown name; whatever its constructor
    raises for arguments that it does not take."""
    check_known(name)
    if timm.is_model(name):
        return timm.create_model(name, **options)
    if options.pop("pretrained", False):
        raise InputError(f"weights of torchvision's {name} are not fetched; give them as a checkpoint")
    return torchvision.models.get_model(name, weights=None, **options)


def takes_size(name: str) -> bool:
    """Networks of timm whose weights depend on the size of the image; others take any, or have an option of their
    own. Raises InputError for an unknown name."""
    check_known(name)
    return name.partition(".")[0].startswith("asvit") or bool(pretrained_config(name).get("fixed_input_size"))


def pretrained_config(name: str) -> dict[str, Any]:
    """The preprocessing of its images, in timm's names, and more that timm says of its weights."""
    known = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    return dict(_IMAGENET) if known is None else known.to_dict()


def module_of(name: str) -> ModuleType:
    """The module that defines the network. Raises InputError for an unknown name."""
    check_known(name)
    builder = model_entrypoint(name) if timm.is_model(name) else torchvision.models.get_model_builder(name)
    return sys.modules[builder.__module__]


def _torchvisions() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)
