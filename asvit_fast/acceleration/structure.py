"""Recognising code that is no package: by the attributes of a module, and by what its methods do (``syntax``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from .replacement import Names, Replacement, bound, parts_of, source_type
from .syntax import is_package, method_digest

Structure = Mapping[str, Mapping[str, Names]]


class Structural(Replacement):
    """Base class of replacements for code that people copy. Which class such a replacement stands for is known when it
    is met: a subclass of both is made then, whose ``source`` it is.

    Nothing is recognised by its name: a module must have all that the replacement `reads` and its `parts`, and the
    methods in `structure`, its own and those of its submodules, must be known ones.
    """

    origin: ClassVar[str]  # repository, file and class
    structure: ClassVar[Structure]  # by path of a submodule, "" itself: by method, its digests

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as its source and the name of the replacement, as its class is made at run time."""
        kind = type(self)
        if "source" not in vars(kind):  # sharding or a parametrization has derived one of its own
            return super().__reduce_ex__(protocol)
        parts = tuple((path, kind.parts[path][0]) for path in self.structure if path)
        return make, (kind.__bases__[0], kind.source, parts), vars(self)


def make(replacement: type[Replacement], source: type[nn.Module], parts: tuple[tuple[str, type], ...]) -> Any:
    """An instance without state, for unpickling and deepcopy."""
    kind: Any = bound(replacement, source, parts)
    return kind.__new__(kind)


def _source_class(module: nn.Module) -> type[nn.Module]:
    """The class that somebody wrote."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) else kind


def is_own_code(module: nn.Module) -> bool:
    """Whether the class of a module is of no known package."""
    return not is_package(source_type(module).__module__)


def _has(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    _, part = next(parts_of(module, [owner])) if owner else ("", module)
    if part is None:
        return False
    places = (part.__dict__, part._parameters, part._buffers, part._modules)
    return any(name in place for place in places) or hasattr(type(part), name)


def looks_like(replacement: type[Structural], module: nn.Module) -> bool:
    """Whether a module has the attributes of those that a replacement stands for."""
    return all(
        _has(module, path) for path in (*replacement.reads, *replacement.parts, *filter(None, replacement.structure))
    )


def _code_reason(replacement: type[Structural], path: str, kind: type) -> str | None:
    for name, digests in replacement.structure[path].items():
        method, digest = ".".join(filter(None, (path, name))), method_digest(kind, name)
        if digest is None:
            return f"its {method} has no source that can be read"
        if digest not in digests:
            return f"its {method} is not that of {replacement.origin}"
    return None


def structure_reason(replacement: type[Structural], module: nn.Module) -> str | None:
    """Why the code of a module that looks like it is not that which a replacement stands for; None if it is."""
    for path in replacement.structure:
        part: Any = next(parts_of(module, [path]))[1] if path else module
        why = _code_reason(replacement, path, _source_class(part) if part is module else source_type(part))
        if why is not None:
            return why
    return None


def bound_to(replacement: type[Structural], module: nn.Module) -> type[Replacement]:
    """The class that a module of known structure may become."""
    parts = tuple((path, source_type(part)) for path, part in parts_of(module, filter(None, replacement.structure)))
    return bound(replacement, _source_class(module), parts)
