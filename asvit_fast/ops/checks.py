"""Checks of arguments: the same whichever implementation runs, with an error of one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError

Check = TypeVar("Check", bound=Callable[..., Any])
_PLAIN = (Tensor, nn.Parameter)
_VALUES = frozenset({bool, int, float, str, type(None)})
_REMEMBERED = 4096  # arguments that passed a check, for each check


def once_per_arguments(check: Check) -> Check:
    """Run a check, which returns what follows from its arguments, once for all that look the same: tensors by shape,
    dtype and device, everything else by type and value. Only of plain tensors, and not while something traces, as
    sizes are symbols then."""
    passed: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(check)
    def checked(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return check(*arguments)
        key: list[Any] = []
        for argument in arguments:
            kind = type(argument)
            if kind in _PLAIN:
                key += argument.shape, argument.dtype, argument.device
            elif kind is tuple or kind is list:  # True is 1, and 1.0 as well
                key += kind, (*argument,), (*map(type, argument),)
            elif kind in _VALUES or not isinstance(argument, Tensor):
                key += kind, argument
            else:
                return check(*arguments)
        found = tuple(key)
        try:
            result = passed.get(found, passed)
        except TypeError:  # an argument has no hash
            return check(*arguments)
        if result is passed:
            result = check(*arguments)
            if len(passed) >= _REMEMBERED:
                passed.clear()
            passed[found] = result
        return result

    return checked  # type: ignore[return-value]


def _is_integer(value: object) -> bool:
    """Python's, numpy's, a symbol of torch.compile, or, as sizes are in torch.jit.trace, a tensor; no bool."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return not isinstance(value, bool) and (isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__"))


def check_integer(op: str, name: str, value: int, least: int) -> None:
    """InputError unless ``value`` is an integer (True is none), and at least ``least``."""
    if not _is_integer(value):
        raise InputError(f"{op}: {name} must be an integer, got {value}")
    if value < least:
        wanted = "positive" if least == 1 else f"at least {least}"
        raise InputError(f"{op}: {name} must be {wanted}, got {value}")


def _is_real(value: object) -> bool:
    """Python's, numpy's, a symbol of torch.compile, or, as sizes are in torch.jit.trace, a tensor; no bool."""
    if isinstance(value, Tensor):  # whose gradient would be lost
        return torch.jit.is_tracing() and value.dim() == 0
    known = isinstance(value, (float, int, torch.SymFloat)) or hasattr(value, "__float__")
    return known and not isinstance(value, bool)


def check_scale(op: str, value: float | None) -> None:
    """InputError unless ``value`` is None or a finite number."""
    if value is not None:
        if not _is_real(value):
            raise InputError(f"{op}: scale must be a number, got {value}")
        if not -float("inf") < value < float("inf"):
            raise InputError(f"{op}: scale must be finite, got {value}")


def check_eps(op: str, value: float) -> None:
    """InputError unless ``value`` is a finite number and not negative; 0 is one, as for torch's LayerNorm."""
    if not _is_real(value):
        raise InputError(f"{op}: eps must be a number, got {value}")
    if not 0.0 <= value < float("inf"):
        raise InputError(f"{op}: eps must be finite and not negative, got {value}")


def check_probability(op: str, name: str, value: float) -> None:
    """InputError unless ``value`` is a number from 0 to 1."""
    if not _is_real(value) or not 0.0 <= value <= 1.0:
        raise InputError(f"{op}: {name} must be from 0 to 1, got {value}")


def check_length(op: str, name: str, values: object, count: int) -> None:
    """InputError unless ``values`` is a sequence of this length."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise InputError(f"{op}: {name} must be {count} integers, got {values}")


def check_tensor(op: str, name: str, value: object) -> None:
    """InputError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floats(op: str, name: str, x: Tensor) -> None:
    """InputError unless ``x`` is a tensor of float32, float64, float16 or bfloat16."""
    check_tensor(op, name, x)
    if not x.is_floating_point():
        raise InputError(f"{op}: {name} must be floating point, got {x.dtype}")
    if x.element_size() < 2:
        raise InputError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def check_device(op: str, name: str, operand: Tensor, x: Tensor) -> None:
    """InputError unless ``operand`` is on the device of ``x``."""
    if operand.device != x.device:
        raise InputError(f"{op}: {name} must be on {x.device}, got one on {operand.device}")


def check_devices(op: str, x: Tensor, /, **operands: Tensor | None) -> None:
    """The same for several, some of which may be missing: a kernel that ran without a look at them would read memory
    that is not there, and where one of them is on the meta device nothing would be computed at all."""
    for name, operand in operands.items():
        if operand is not None:
            check_device(op, name, operand, x)


def check_operand(op: str, name: str, operand: Tensor | None, shape: list[int], x: Tensor) -> None:
    """InputError unless ``operand`` is None, or of ``shape``, any floating dtype and on the device of ``x``."""
    if operand is None:
        return
    check_tensor(op, name, operand)
    if list(operand.shape) != shape:
        raise InputError(f"{op}: {name} must be {shape}, got {list(operand.shape)}")
    check_floats(op, name, operand)
    check_device(op, name, operand, x)
