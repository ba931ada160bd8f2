"""Windowed attention in a network that is not known: what could be faster if somebody added it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from .registry import likeness, qualified_name
from .replacement import names_in_code, source_type
from .syntax import is_package

HOW_TO_ADD = 'to add it: a class and `asvit_fast.acceleration.register`, see README, "Modules of your own"'
OF_WINDOWS = ("relative_position_bias_table", "relative_position_index", "window_size")
CUTS = re.compile(r"window.*(partition|reverse|unpartition)|(partition|reverse|merge|split).*window", re.IGNORECASE)
ATTENDS = re.compile(r"softmax|attention|attn", re.IGNORECASE)


@dataclass(frozen=True)
class Unknown:
    """A class of modules that seem to attend inside windows, and that no family claims."""

    source: str  # the class
    file: str  # where it is
    modules: tuple[str, ...]  # names in the model
    reason: str | None  # why it is not recognised, if it is like a known one


def _names(module: nn.Module) -> frozenset[str]:
    """Every name in the methods of its class."""
    return frozenset(name for name in names_in_code(source_type(module)) if name.isidentifier())


def attends(module: nn.Module) -> bool:
    """Whether a module, or one in it, seems to be an attention, by the names in its methods."""
    return any(ATTENDS.search(name) for part in module.modules() for name in _names(part))


def is_windowed(module: nn.Module) -> bool:
    """Whether a module seems to attend inside windows, by its attributes and the names in its methods."""
    where = source_type(module).__module__
    if where.startswith(("torch.", "asvit_fast.")) or next(module.parameters(), None) is None:
        return False
    cuts = any(CUTS.search(name) for name in _names(module))
    places = (module.__dict__, module._parameters, module._buffers)
    has_windows = any(name in place for place in places for name in OF_WINDOWS)
    # in packages it may be the whole map that has such attributes
    return (cuts or (has_windows and not is_package(where))) and attends(module)


def _file(kind: type) -> str:
    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):
        return kind.__module__


def _within(name: str, others: Set[str]) -> bool:
    """Whether a module or one that it is in is among others."""
    parts = name.split(".")
    return "" in others or any(".".join(parts[:end]) in others for end in range(1, len(parts) + 1))


def _candidates(model: nn.Module, claimed: Set[str]) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, reason) of windowed modules that neither are in a claimed one nor have one in them."""
    around = {".".join(name.split(".")[:end]) for name in claimed for end in range(name.count(".") + 1)}
    for name, module in model.named_modules():
        if name in around or (claimed and not name) or _within(name, claimed):
            continue
        reason = likeness(module)
        if reason is not None or is_windowed(module):
            yield name, module, reason


def unknown_attention(model: nn.Module, claimed: Set[str]) -> tuple[Unknown, ...]:
    """The classes of windowed attention in a model, but for modules that are claimed by name; of those inside each
    other the one that is like a known class, or the innermost."""
    found = list(_candidates(model, claimed))
    alike = {name for name, _, reason in found if reason is not None}
    names = {name for name, _, _ in found}
    kinds: dict[type, list[Any]] = {}
    for name, module, reason in found:
        inside = {other for other in names if other != name and (not name or other.startswith(f"{name}."))}
        outer = alike - {name}
        if reason is None and (inside or _within(name, outer)):
            continue
        if reason is not None and inside & alike:
            continue
        kinds.setdefault(source_type(module), [reason]).append(name)
    return tuple(
        Unknown(qualified_name(kind), _file(kind), tuple(names), reason) for kind, (reason, *names) in kinds.items()
    )
