"""Base of the classes that ``accelerate`` gives to modules of other packages.

A replacement is a subclass of the class that it replaces, `source`, and changes methods only: state, parameters, hooks
and training mode stay those of the instance, whose ``__class__`` alone is set. Modules inside are called exactly as the
source calls them, or not at all: a fused op computes with the weights of its `parts`. Nobody can tell the difference
as long as calling a part runs the known ``forward`` on plain weights and nothing else, so this is asked before the
swap and again at every call. Where the answer is no, the source's method runs, with one warning.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from .. import backends
from ..errors import InputError
from ..ops.transforms import function_mode
from .unchanged import is_kept, keep

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)
COLLECTS = "transformers.utils.output_capturing"
LINEAR, DROP, SOFTMAX = (nn.Linear,), (nn.Dropout,), (nn.Softmax,)
PLAIN = (nn.Parameter, Tensor, FakeTensor)
WEIGHTED = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm)
PACKAGES = ("torch.nn.modules.", "timm.", "torchvision.", "transformers.", "monai.")
Names = tuple[str, ...]
Parts = Mapping[str, tuple[type, ...]]


class Replacement:
    """Mixin, first of the bases; the second is the class that is replaced."""

    source: ClassVar[type[nn.Module]]  # the class that is replaced
    ops: ClassVar[Names] = ()  # that do the work; empty where it is done by torch's own
    parts: ClassVar[Parts] = {}  # submodules that are not called, by path: the classes that they must have exactly
    reads: ClassVar[Names] = ()  # attributes, by path, that another version of the package may not have
    bypassed: ClassVar[
        Names
    ] = ()  # methods, in some versions of the source, that only its own version of a method calls
    bypassed_of_parts: ClassVar[Parts] = {}  # methods of classes of parts that are not called either
    __jit_unused_properties__: ClassVar[list[str]] = ["qconfig"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """`source` is the base that is a module of another package. timm's feature extraction by torch.fx takes a
        replacement as it is: its Python branches on sizes."""
        super().__init_subclass__(**kwargs)
        sources = [base for base in cls.__bases__ if issubclass(base, nn.Module) and not issubclass(base, Replacement)]
        if sources:
            cls.source = sources[0]
        register_notrace_module(cls)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked by torch.jit.script, which cannot compile a replacement."""
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__} of an accelerated network: "
            "call asvit_fast.restore(model) first, or use torch.jit.trace, torch.compile or torch.export"
        )

    @classmethod
    def bypassed_parts(cls) -> Parts:
        """`parts`; for classes that are known at run time only, found there."""
        return cls.parts

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        """Why nothing would be gained for this instance; None if something would."""
        return None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why the fused ops would not do what this instance does now; None if they would."""
        return bypass_reason(module, cls.bypassed_parts())

    def can_run(self) -> bool:
        """Whether the fused path may run at this call; warns once where not."""
        if torch.compiler.is_compiling():
            self._guard()
        return self._can_run()

    @torch.compiler.assume_constant_result  # while tracing; what is guarded makes torch.compile ask again
    def _can_run(self) -> bool:
        if counts_modules():  # FlopCounterMode, whose table is of the source's modules: nothing to warn of
            return False
        why = global_hook_reason() or patch_reason(type(self), self) or self.unsupported_reason(self)
        if why is not None:
            name = self.source.__name__
            backends.notify_once((name, why), f"asvit_fast runs {name} as its package does: {why}")
        return why is None

    @torch.compiler.assume_constant_result
    def _paths(self) -> tuple[str, ...]:
        return tuple(self.bypassed_parts())

    def _guard(self) -> None:
        """Looks at all parts, so that torch.compile guards class and ``forward`` of those that nothing traced uses."""
        for path in self._paths():
            part: Any = self
            for name in path.split("."):
                part = getattr(part, name)
            _ = getattr(part, "forward", None)
            _ = getattr(part, "dim", None) == -1  # of a Softmax

    @property
    def qconfig(self) -> Any:
        """The attribute that torch.ao's quantisation sets on modules before it replaces layers by their exact type."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise InputError(
            f"torch.ao.quantization knows layers by their exact class and would leave each {type(self).__name__} as it "
            "is: call asvit_fast.restore(model), quantise, then asvit_fast.accelerate again"
        )


_bound: dict[tuple[Any, ...], type[Replacement]] = {}


def bound(
    replacement: type[Replacement], source: type[nn.Module], parts: tuple[tuple[str, type], ...] = ()
) -> type[Replacement]:
    """A replacement for the classes of one package is itself; one that can only be recognised when it is met, of code
    that is no package, is derived from it here, once for each, with the classes of `parts` that were met."""
    if "source" in vars(replacement):
        return replacement
    key = (replacement, source, parts)
    if key not in _bound:
        known = {path: (kind,) for path, kind in parts}
        members = {"source": source, "parts": {**known, **replacement.parts}, "__module__": replacement.__module__}
        _bound[key] = type(replacement.__name__, (replacement, source), members)
    return _bound[key]


def source_type(module: object) -> type:
    """The class of a module, or that which it was before ``accelerate``."""
    kind = type(module)
    return kind.source if issubclass(kind, Replacement) and "source" in vars(kind) else kind


def made_by_package(module: object) -> bool:
    """Whether a module is of a class that torch.nn or a known package has for networks: nobody put it there afterwards
    to adapt, quantise or wrap something."""
    return type(module).__module__.startswith(PACKAGES)


# --------------------------------------------------------------------------- methods that were replaced


@functools.cache
def overridden(replacement: Any) -> frozenset[str]:
    """The methods of the source that do not run any more."""
    own = [kind for kind in replacement.__mro__ if issubclass(kind, Replacement) and kind is not Replacement]
    names = {name for kind in own for name, value in vars(kind).items() if inspect.isfunction(value)}
    names = {name for name in names if not name.startswith("__")} | set(replacement.bypassed)
    return frozenset(name for name in names if hasattr(replacement.source, name))


@functools.cache
def _bypassed_methods(replacement: Any) -> tuple[tuple[type, str], ...]:
    """(class, method) of all that a fused path does in place of the source and of its parts."""
    parts = {kind for kinds in replacement.bypassed_parts().values() for kind in kinds if issubclass(kind, nn.Module)}
    own = [(replacement.source, name) for name in sorted(overridden(replacement))]
    of_parts = [(kind, name) for name, kinds in replacement.bypassed_of_parts.items() for kind in kinds]
    return (*own, *((kind, "forward") for kind in sorted(parts, key=str)), *of_parts)


_original_methods: set[Any] = set()  # functions that were seen to be those of their class
DECORATES = "transformers.modeling_layers"  # whose layers wrap the forward of every class derived from them


def is_decorated(method: Any) -> bool:
    """Whether a method is what such a package makes of one when its class is defined."""
    return isinstance(method, FunctionType) and method.__globals__["__name__"] == DECORATES


def is_original(kind: type, name: str) -> bool:
    """Whether the method of a class is the one that its own file defines."""
    method = getattr(kind, name)
    if method in _original_methods:
        return True
    owner = next(base for base in kind.__mro__ if name in vars(base))
    if not isinstance(method, FunctionType) or (hasattr(method, "__wrapped__") and not is_decorated(method)):
        return False
    if (method.__module__, method.__qualname__) != (owner.__module__, f"{owner.__qualname__}.{name}"):
        return False
    _original_methods.add(method)
    return True


def patch_reason(replacement: Any, module: Any) -> str | None:
    """Why the methods that the fused path stands for are not those that it knows."""
    for kind, name in _bypassed_methods(replacement):
        if not is_original(kind, name):
            return f"{kind.__name__}.{name} was replaced by {getattr(getattr(kind, name), '__module__', 'something')}"
    return instance_patch_reason(module, overridden(replacement))


def instance_patch_reason(module: nn.Module, methods: Iterable[str]) -> str | None:
    """Why an instance does not have the methods of its class."""
    for name in methods:
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
    return None


@functools.cache
def names_in_code(kind: Any) -> frozenset[str]:
    """Every name and string in the methods of a class: among them all that it registers."""
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method in vars(base).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None:
                names |= {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
    return frozenset(names)


def unknown_reason(module: nn.Module) -> str | None:
    """Why an instance is not in a state that its class makes: it has more, or lacks its weights."""
    known = names_in_code(source_type(module))
    submodules = {} if isinstance(module, nn.Sequential) else module._modules
    for what, names in (("parameter", module._parameters), ("buffer", module._buffers), ("submodule", submodules)):
        for name in names:
            if name not in known:
                return f"it has a {what} {name!r} that its class does not know"
    if isinstance(module, WEIGHTED) and "weight" not in module._parameters:
        return "its weight is not one of its parameters"
    return None


def version_reason(replacement: type[Replacement], module: nn.Module) -> str | None:
    """Why the version of the package is not the known one: an attribute that the replacement reads is not there."""
    for path in replacement.reads:
        owner, _, name = path.rpartition(".")
        _, part = next(parts_of(module, [owner])) if owner else ("", module)
        if part is None or (owner and source_type(part) not in replacement.bypassed_parts()[owner]):
            continue  # for another reason
        places = (part.__dict__, part._parameters, part._buffers, part._modules)
        if not any(name in place for place in places) and not hasattr(type(part), name):
            return f"this version of its package is not known: its {path} is missing"
    return None


# --------------------------------------------------------------------------- what may be seen of a call


def global_hook_reason() -> str | None:
    """Why every module must be called as before."""
    if any(GLOBAL_HOOKS):
        return "hooks of all modules (register_module_forward_hook and others) see every call"
    mode = function_mode()
    return None if mode is None else f"a TorchFunctionMode ({mode}) sees every function"


def counts_modules() -> bool:
    """Whether torch follows which module runs, and nobody else does."""
    hooks = [hook for hooks in GLOBAL_HOOKS for hook in hooks.values()]
    return len(hooks) > 0 and all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def _collects_nothing(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers collects outputs, and now collects none of a part: it stays
    on a module once any output was asked for."""
    if getattr(hook, "__module__", None) != COLLECTS:
        return False
    return "attentions" not in (sys.modules[COLLECTS]._active_collector.get() or ())


def hook_reason(module: nn.Module) -> str | None:
    """Why calling the module does more than its ``forward``."""
    for attribute, kind in HOOKS.items():
        hooks = getattr(module, attribute)
        if hooks and not all(map(_collects_nothing, hooks.values())):
            return f"has a {kind}"
    return None


@functools.cache
def _method_names(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))


def call_reason(part: nn.Module) -> str | None:
    """Why calling a module of a known class does not do just what its class does."""
    why = hook_reason(part)
    if why is not None:
        return why
    if part._compiled_call_impl is not None:
        return "is compiled by itself"
    kind: Any = type(part)
    names = _method_names(kind)
    if not names.isdisjoint(part.__dict__):
        return f"has a {next(name for name in part.__dict__ if name in names)} of its own"
    if not torch.compiler.is_compiling():  # parameters are stand-ins then
        for name, weight in part._parameters.items():
            if weight is not None and type(weight) not in PLAIN:
                return f"has a {name} that is a {type(weight).__name__}"
    return None


def parts_of(module: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, nn.Module | None]]:
    """(path, submodule) without a look at anything else, as properties may have side effects."""
    for path in paths:
        part: nn.Module | None = module
        for name in path.split("."):
            part = None if part is None else part._modules.get(name)
        yield path, part


def _is_plain_scale(part: nn.Module) -> bool:
    """Whether the scale of an attention, if it has one, is a number, which has no gradient."""
    places = (part.__dict__, part._parameters, part._buffers, part._modules)
    scales = [place["scale"] for place in places if "scale" in place]
    return all(isinstance(scale, (int, float)) and math.isfinite(scale) for scale in scales)


def bypass_reason(module: nn.Module, parts: Parts) -> str | None:
    """Why the named submodules cannot be left out: they are not exactly of the classes given, or something is attached
    to them; or why an op cannot have their scale."""
    traced = torch.compiler.is_compiling()  # parameters are stand-ins then
    if not traced and is_kept(module, parts):
        return None
    why = _bypass_reason(module, parts)
    if why is None and not traced:
        keep(module, parts)
    return why


def _bypass_reason(module: nn.Module, parts: Parts) -> str | None:
    for path, part in (("", module), *parts_of(module, parts)):
        if part is not None and not _is_plain_scale(part):
            return f"its {path}.scale is not a finite number".replace(" .", " ")
    for path, part in parts_of(module, parts):
        if source_type(part) not in parts[path]:
            return f"its {path} is {'missing' if part is None else f'a {type(part).__name__}'}"
        why = None if part is None else call_reason(part)
        if why is not None:
            return f"its {path} {why}"
        if isinstance(part, nn.Softmax) and part.dim != -1:
            return f"its {path} is over dimension {part.dim}"
    return None
