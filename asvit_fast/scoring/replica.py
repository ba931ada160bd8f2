"""A network to work on in place of one's own."""

from __future__ import annotations

import collections
import contextlib
import copy
from typing import Any

from torch import Tensor, nn

_OWN_CONTAINERS = ("_parameters", "_buffers", "_modules")


def replica(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in evaluation mode: whatever it does leaves no trace in ``model``.

    Parameters are shared, but those of modules that do something of their own when the mode changes (as merging weights
    in place). Buffers, hooks and caches are copied. Caches that modules drop when they are trained (timm's attention
    biases) are empty, so that gradients reach what they were computed from.
    """
    changing = [module for module in model.modules() if type(module).train is not nn.Module.train]
    own = {id(parameter) for module in changing for parameter in module.parameters()}
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own}
    for module in model.modules():
        shared |= {id(t): t.detach().clone() for t in _tensors(vars(module)) if not t.is_leaf}  # deepcopy refuses those
        shared |= {id(empty): type(empty)() for empty in vars(module).values() if _is_empty_dict(empty)}  # and is slow
    try:
        copied = copy.deepcopy(model, dict(shared))
    except Exception:  # a lock, a file, a library's handle
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in _OWN_CONTAINERS and not _can_be_copied(value, shared):
                    shared[id(value)] = value
        copied = copy.deepcopy(model, shared)
    return copied.train().eval()


def _tensors(values: Any, depth: int = 3) -> list[Tensor]:
    """Tensors in attributes, and in lists, tuples and dicts of them."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in _tensors(value, depth - 1)] if depth else []


def _is_empty_dict(value: Any) -> bool:
    """As most of a module's are."""
    return type(value) in (dict, collections.OrderedDict) and not value


def _can_be_copied(value: Any, shared: dict[int, Any]) -> bool:
    with contextlib.suppress(Exception):
        copy.deepcopy(value, dict(shared))
        return True
    return False
