"""What was found of a module and its parts holds as long as they are what they were: to see that takes a fourth of the
time that it takes to find it again, and every call of a replacement asks."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Contents = Mapping[Any, Any]  # attributes, submodules, parameters, buffers or hooks by name


_ATTRIBUTE = "_asvit_fast_unchanged"  # of a module: parts may refer to it, and kept elsewhere it would live for ever


@dataclass(frozen=True, slots=True)
class _State:
    """Of a module: what is compared, by identity. Values are the dictionaries' own, which follow their changes. Copies
    and files have none."""

    paths: Iterable[str]
    scale: Any
    parts: list[nn.Module]
    kinds: list[type]
    filled: list[tuple[Any, list[Any]]]  # values, and those that were there
    empty: list[Contents]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()

    def __deepcopy__(self, memo: Any) -> None:
        return None


def _parts(module: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """Submodules at `paths` and on the way to them, as far as they are there."""
    found: dict[str, nn.Module] = {}
    for path in paths:
        part: nn.Module | None = module
        names = path.split(".") if path else []
        for number, name in enumerate(names, 1):
            part = None if part is None else part._modules.get(name)
            if part is not None:
                found[".".join(names[:number])] = part
    return [*found.values()]


def keep(module: nn.Module, paths: Iterable[str]) -> None:
    """Remember a module and its parts as they are, unless one has hooks, which may do anything."""
    parts = _parts(module, paths)
    contents: list[Contents] = [module._modules, module._parameters, module._buffers]
    hooks: list[Contents] = []
    for part in parts:
        contents += vars(part), part._modules, part._parameters, part._buffers
        hooks += part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks
    if not any(hooks):
        filled = [(content.values(), [*content.values()]) for content in contents if content]
        empty = [content for content in (*contents, *hooks) if not content]
        vars(module)[_ATTRIBUTE] = _State(paths, vars(module).get("scale"), parts, [*map(type, parts)], filled, empty)


def forget(module: nn.Module) -> None:
    """What was kept holds on to weights."""
    vars(module).pop(_ATTRIBUTE, None)


def is_kept(module: nn.Module, paths: Iterable[str]) -> bool:
    """Whether they are as they were: every attribute, submodule, parameter and buffer is the same object, none was
    added, and there is no hook. If not, they are forgotten."""
    state = vars(module).get(_ATTRIBUTE)
    if type(state) is not _State or state.paths is not paths:
        return False
    if _holds(module, state):
        return True
    forget(module)
    return False


def _holds(module: nn.Module, state: _State) -> bool:
    if any(state.empty):
        return False
    if [*map(type, state.parts)] != state.kinds or vars(module).get("scale") is not state.scale:
        return False
    for values, kept in state.filled:
        if len(values) != len(kept) or not all(map(operator.is_, values, kept)):
            return False
    return True
