"""Swap slow modules of other packages' vision transformers for fused ones, in place and reversibly.

An instance changes its class and nothing else: state_dict, parameters, hooks, training mode, deepcopy and pickle stay
as they were, and ``restore`` gives the class back. ``registry.FAMILIES`` lists what is known, with what runs instead,
or why it is left alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import backends
from ..errors import InputError
from ..settings import check_kind
from .registry import Family, family_of, qualified_name, replacement_of
from .replacement import Replacement, is_decorated, parts_of, patch_reason, source_type, unknown_reason, version_reason
from .report import Decision, OpRun, Report
from .unchanged import forget
from .unknown import attends, is_windowed, unknown_attention

# --------------------------------------------------------------------------- which class becomes which


def _is_another_class(module: nn.Module, source: type[nn.Module]) -> bool:
    """Whether a module is of a class that its package, or torch, derived from the known one: nobody claims to know
    that, whereas a class of the user's or one that was made at run time stands for a known one."""
    kind = type(module)
    if parametrize.is_parametrized(module) or issubclass(kind, Replacement) or kind is source:
        return False
    return source is nn.Linear or kind.__module__.partition(".")[0] == source.__module__.partition(".")[0]


def _unsupported_reason(module: nn.Module, replacement: type[Replacement]) -> str | None:
    """Why an instance of a known class keeps it; None if it can be swapped. Nothing is called, no property read."""
    kind, source = source_type(module), replacement.source
    if parametrize.is_parametrized(module):
        return f"its {', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if kind is not source:
        return f"its class {qualified_name(kind)} is not exactly {qualified_name(source)}"
    parts = [("", module), *parts_of(module, replacement.parts)]
    unknown = (
        f"{f'its {path}: ' if path else ''}{why}" for path, part in parts if part and (why := unknown_reason(part))
    )
    return patch_reason(replacement, module) or replacement.unsupported_reason(module) or next(unknown, None)


# --------------------------------------------------------------------------- what runs the ops


def _whereabouts(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and precision of a module's first parameter."""
    for parameter in module.parameters():
        return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _op_run(op: str, device: torch.device, dtype: torch.dtype) -> OpRun:
    """The backend of an op there now, and what would have to be installed for a faster one."""
    backend, missing = backends.best(op, device)
    if backend == "sdpa":
        backend = "reference"
    if backend == "triton" and dtype == torch.float64:
        backend, missing = "reference", "the Triton kernels compute in float32"
    elif backend == "reference" and missing is None:
        missing = f"no kernels for {device.type}"
    return OpRun(op, device.type, str(dtype).removeprefix("torch."), backend, missing)


def _op_runs(module: nn.Module, replacement: type[Replacement]) -> list[OpRun]:
    device, dtype = _whereabouts(module)
    if device.type == "meta":  # it is decided where the weights will be
        return []
    importlib.import_module("asvit_fast.ops")  # every op declares its backends when its module is imported
    return [_op_run(op, device, dtype) for op in replacement.ops]


# --------------------------------------------------------------------------- swapping


@dataclass(frozen=True)
class _Plan:
    """The plan for one module."""

    module: nn.Module
    kind: type  # the class that it gets
    decision: Decision
    runs: list[OpRun]


def _plan(name: str, module: nn.Module, family: Family, source: type[nn.Module]) -> _Plan | None:
    """None for a module that is not worth a line."""
    kind = source_type(module)
    title = qualified_name(source if kind is source else type(module))
    try:
        replacement = replacement_of(family, source)
    except (ImportError, AttributeError) as error:
        reason = f"this version of its package is not known: {error}"
        return _Plan(module, kind, Decision(name, title, None, reason), [])
    if _is_another_class(module, source):
        return None
    unknown_version = None if replacement is None else version_reason(replacement, module)
    if unknown_version is not None:
        return _Plan(module, kind, Decision(name, title, None, unknown_version), [])
    skip_reason = family.notes if replacement is None else replacement.skip_reason(module)
    if replacement is None or skip_reason is not None:
        return _Plan(module, kind, Decision(name, title, None, skip_reason, nothing_to_gain=True), [])
    runs = _op_runs(module, replacement)
    derived = issubclass(type(module), Replacement) and kind is type(module)  # by sharding or a parametrization
    why = replacement.unsupported_reason(module) if derived else _unsupported_reason(module, replacement)
    slow = next((run for run in runs if run.backend == "reference"), None)
    if why is None and slow is not None:
        why = f"no kernel of {slow.op} runs on {slow.device}: {slow.missing}"
    if why is not None:
        return _Plan(module, kind, Decision(name, title, None, why), runs)
    target = kind if derived else replacement
    return _Plan(module, target, Decision(name, title, target.__name__, None), runs)


def _plans(model: nn.Module) -> Iterator[_Plan]:
    """Every module of a known class, with the class that it gets."""
    for name, module in model.named_modules():
        found = family_of(module)
        plan = None if found is None else _plan(name, module, *found)
        if plan is not None:
            yield plan


def _claims_attention(plan: _Plan) -> bool:
    """Whether a plan, whatever it decides, is one for windowed attention."""
    left = plan.decision.nothing_to_gain and attends(plan.module)
    return "window_attention" in getattr(plan.kind, "ops", ()) or left or is_windowed(plan.module)


def accelerate(model: nn.Module, strict: bool = False) -> Report:
    """Give the modules of known classes (``FAMILIES``) in a model a class that runs fused ops, in place.

    Same parameters, state_dict, hooks and results up to rounding (``verify`` compares on your data), dropout of the
    same seed included; nothing but the class of single instances changes, so deepcopy, pickle, optimizers, EMA,
    torch.compile and sharding work as before. Call it on the device and in the precision that the model will have,
    before ``fully_shard`` and torch.compile. Tools that look for exact types come before it: torch.ao's quantisation
    refuses accelerated models, counters such as thop see no ``nn.Linear``. torch.jit.script needs the restored model,
    and so does torch.fx where it does not take replacements as leaves, as timm's feature extraction does. torch.export
    keeps the fused ops; torch.onnx.export (``dynamo=True``) replaces them by standard operators. Calling it again
    brings it up to date; ``restore`` undoes it.

    A module is left alone, with the reason in the report, when its class is a subclass of a known one or was patched;
    when anybody could see that a submodule is not called any more, or called with something else: it has hooks, a
    parametrization, another class than expected (adapters, quantised layers), a method of its own; and where no kernel
    runs here. What turns up later, such as a hook, another mask or shift, or attention dropout in training, makes the
    module run as its package does at that call, with one warning (``FallbackWarning``); torch.compile looks at the
    numbers of a mask when it compiles. Attention weights that are asked for (``output_attentions``) are the source's.
    No module is called here and no property read.

    Args:
        model: any model of timm, torchvision, transformers, MONAI, code that is no package or your own; its modules are
            searched.
        strict: raise if a module that could be faster cannot be taken, for a reason in this model or this machine.
            Modules that would not be faster anyway do not count.

    Returns:
        What was done: print it, or use ``swapped``, ``left``, ``ops``, ``unknown`` and ``to_dict()``. ``unknown`` are
        classes that seem to attend inside windows and are not known: ``acceleration.register`` adds one. They do not
        count for ``strict``.

    Raises:
        InputError: what is given is no module; with ``strict``, the modules left and why, the model is as it was.

    Examples:
        >>> import timm, asvit_fast as af
        >>> model = timm.create_model("swin_tiny_patch4_window7_224").eval()
        >>> report = af.accelerate(model)  # print it to see what was swapped, what was left, and why
        >>> type(model.layers[0].blocks[0]).__name__
        'FastSwinTransformerBlock'
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module, such as timm.create_model(NAME) makes")
    plans = list(_plans(model))
    runs = dict.fromkeys(run for plan in plans for run in plan.runs)
    claimed = {plan.decision.name for plan in plans if _claims_attention(plan)}
    decisions = tuple(plan.decision for plan in plans)
    report = Report(decisions, tuple(runs), unknown_attention(model, claimed))
    if strict and report.left:
        raise InputError(f"accelerate(strict=True) cannot take {len(report.left)} modules: {report.why_left()}")
    for plan in plans:
        if plan.kind is not type(plan.module):
            plan.module.__class__ = plan.kind
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every module gets the class back that it had. Returns the model.

    Also on copies and after unpickling; harmless on a model that was never accelerated. A class made from a replacement
    since (by ``fully_shard`` or a parametrization) is made again from the original. Raises InputError for what is no
    module.

    Examples:
        >>> import timm, asvit_fast as af
        >>> model = timm.create_model("swin_tiny_patch4_window7_224").eval()
        >>> report = af.accelerate(model)
        >>> type(af.restore(model).layers[0].blocks[0]).__name__
        'SwinTransformerBlock'
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    for module in model.modules():
        if isinstance(module, Replacement):
            bound_method = module.__dict__.get("forward")
            if (
                getattr(bound_method, "__func__", None) is type(module).forward
            ):  # as some collectors of outputs leave it
                del module.__dict__["forward"]
            module.__class__ = _original(type(module))
            forget(module)
    return model


def _original(kind: type) -> type:
    """The class that a replacement, or a class derived from one at run time, stands for."""
    if "source" in vars(kind):
        return kind.source  # type: ignore[attr-defined]
    bases = tuple(_original(base) if issubclass(base, Replacement) else base for base in kind.__bases__)
    names = {base.__name__: original.__name__ for base, original in zip(kind.__bases__, bases, strict=True)}
    name = kind.__name__
    for replaced, original in names.items():
        name = name.replace(replaced, original)
    members = {
        key: value
        for key, value in vars(kind).items()
        if key not in ("__dict__", "__weakref__") and not is_decorated(value)  # which the new class makes again
    }
    return type(name, bases, members)
