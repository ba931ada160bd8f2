"""Checks a replacement against the module that it stands for: what a test of one needs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..errors import InputError
from .report import Report
from .swap import accelerate, restore
from .verify import verify

DTYPES = (torch.float32, torch.bfloat16)
MODES = ("eval", "train")


def _samples(inputs: Any) -> list[Any]:
    samples = list(inputs) if isinstance(inputs, list) else [inputs]
    if not samples:
        raise InputError("check_replacement: inputs are empty")
    return samples


def _converted(sample: Any, dtype: torch.dtype) -> Any:
    if isinstance(sample, Tensor):
        return sample.detach().to(dtype) if sample.is_floating_point() else sample
    if isinstance(sample, dict):
        return {name: _converted(value, dtype) for name, value in sample.items()}
    return type(sample)(_converted(value, dtype) for value in sample) if type(sample) in (tuple, list) else sample


def _called(module: nn.Module, sample: Any) -> Any:
    if isinstance(sample, dict):
        return module(**sample)
    return module(*sample) if isinstance(sample, tuple) else module(sample)


def _can_run(module: nn.Module, sample: Any, dtype: torch.dtype) -> bool:
    """Whether a source takes a sample in a precision."""
    try:
        with torch.no_grad():
            _called(copy.deepcopy(module).to(dtype), _converted(sample, dtype))
    except RuntimeError:
        return False
    return True


def _without_warnings(module: nn.Module, sample: Any, dtype: torch.dtype, mode: str) -> None:
    """AssertionError if a replacement runs what its source does, which every comparison would pass."""
    fast = copy.deepcopy(module).to(dtype)
    fast.train(mode == "train")
    for part in fast.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with backends.forget_notices(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", backends.FallbackWarning)
        try:
            _called(fast, _converted(sample, dtype))
        except backends.FallbackWarning as warning:
            raise AssertionError(f"the replacement did not run: {warning}") from None


def _check_swap(report: Report, module: nn.Module) -> None:
    name = type(module).__name__
    if report.left:
        raise AssertionError(f"{name} was not swapped: {report.why_left()}")
    if not [decision for decision in report.swapped if decision.replacement != "FastLinear"]:
        reasons = [kind.reason for kind in report.unknown if kind.reason] + [
            str(d.reason) for d in report.nothing_to_gain
        ]
        raise AssertionError(f"{name} was not swapped: {'; '.join(reasons) or 'no family claims it or a module in it'}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _check_state(source: nn.Module, fast: nn.Module, sample: Any) -> None:
    """The same state_dict, and everything as before once it is restored."""
    ours, theirs = fast.state_dict(), source.state_dict()
    if list(ours) != list(theirs) or not all(torch.equal(ours[name], theirs[name]) for name in theirs):
        raise AssertionError("the state_dict of the accelerated module is not that of its source")
    restored = restore(copy.deepcopy(fast))
    before = [type(part) for part in source.modules()]
    if [type(part) for part in restored.modules()] != before:
        raise AssertionError("restore does not give every module its class back")
    source.load_state_dict(ours)
    for module in (restored, source):
        module.eval()  # whatever it returns
    with torch.no_grad():
        outputs = [list(_tensors(_called(module, sample))) for module in (restored, source)]
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True)):
        raise AssertionError("the restored module does not compute what its source does")


def check_replacement(
    source_module: nn.Module,
    inputs: Any,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    modes: Sequence[str] = MODES,
) -> Report:
    """Check that ``accelerate`` takes a module, or those in it, and that nothing else changes.

    On copies: outputs and the gradients of all parameters and inputs, accelerated and not, are held against the source
    in float64 (``verify``), in every precision and mode and for every input. The accelerated copy must have run its own
    code; state_dict and the result of ``restore`` are those of the source. A precision in which the source itself
    cannot run an input is left out.

    Args:
        source_module: what a package or your code made, in float32; it stays as it is.
        inputs: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments; or a list of
            such, as for sizes that windows divide and sizes they do not.
        dtypes: precisions, float32 and bfloat16 by default.
        modes: "eval", "train" or both.

    Returns:
        What ``accelerate`` did.

    Raises:
        AssertionError: the module was not swapped, the replacement left the work to its source, or something differs by
            more than rounding; it says what and by how much.
        InputError: no inputs, or a module that cannot be copied.

    Examples:
        >>> import torch, asvit_fast as af
        >>> from timm.models.swin_transformer import PatchMerging
        >>> report = af.check_replacement(PatchMerging(8), torch.randn(2, 6, 6, 8), dtypes=(torch.float32,))
        >>> "FastPatchMerging" in [decision.replacement for decision in report.swapped]
        True
    """
    samples = _samples(inputs)
    try:
        source, fast = (restore(copy.deepcopy(source_module)) for _ in range(2))
    except Exception as error:  # whatever its modules raise
        raise InputError(f"check_replacement: the module cannot be copied: {type(error).__name__}: {error}") from error
    report = accelerate(fast)
    _check_swap(report, source)
    _check_state(source, fast, samples[0])
    compared = 0
    for sample in samples:
        for dtype in dtypes:
            if not _can_run(source, sample, dtype):
                continue
            for mode in modes:
                _without_warnings(fast, sample, dtype, mode)
                result = verify(copy.deepcopy(fast).to(dtype), _converted(sample, dtype), modes=mode, rows=0)
                if not result.ok:
                    raise AssertionError(f"in {dtype}, mode {mode}:\n{result.table(3)}")
                compared += len(result.differences)
    if compared == 0:
        raise AssertionError("the source runs none of the inputs in any of the precisions")
    return report
