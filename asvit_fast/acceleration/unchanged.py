"""What was found of a module and its parts holds as long as they are what they were: to see that takes a fourth of the
time that it takes to find it again, and every call of a replacement asks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

Contents = Mapping[Any, Any]  # attributes, submodules, parameters, buffers or hooks by name


class _State(NamedTuple):
    """Of a module: what is compared, by identity. Values are the dictionaries' own, which follow their changes."""

    paths: Iterable[str]
    scale: Any
    parts: list[nn.Module]
    kinds: list[type]
    filled: list[tuple[Any, list[Any]]]  # values, and those that were there
    empty: list[Contents]


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


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
        _states[module] = _State(paths, vars(module).get("scale"), parts, [*map(type, parts)], filled, empty)


def forget(module: nn.Module) -> None:
    """What was kept holds on to weights."""
    _states.pop(module, None)


def is_kept(module: nn.Module, paths: Iterable[str]) -> bool:
    """Whether they are as they were: every attribute, submodule, parameter and buffer is the same object, none was
    added, and there is no hook. If not, they are forgotten."""
    state = _states.get(module)
    if state is None or state.paths is not paths:
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
