"""The state of torch that an op has to know: transforms that a fused op would not survive, autocast, and tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._device import DeviceContext


def autocast_active(device_type: str) -> bool:
    """Whether operations on such tensors are autocast; those on the meta device never are."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result  # asked while tracing, when the levels of the traced transforms are there
def transform_active() -> bool:
    """A functorch level (grad, vmap, jvp, ...) or a forward-mode level is active.

    Custom ops lose forward-mode tangents without an error and refuse ``torch.func.grad``; public ops then take their
    reference.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off, or unknown as on the meta device."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def function_mode() -> str | None:
    """The class of a TorchFunctionMode that looks at calls, if there is one: a default device does not, and what a
    compiler or torch.export traces by is its own."""
    if torch.compiler.is_compiling():
        return None
    for i in range(torch._C._len_torch_function_stack()):
        kind = type(torch._C._get_function_stack_at(i))
        if kind is not DeviceContext:
            return kind.__name__
    return None


def traced_for_onnx() -> bool:
    """Whether ``torch.onnx.export(..., dynamo=False)`` traces, which cannot take others than torch's."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def sizes(values: Sequence[int]) -> list[int]:
    """Sizes as an op takes them: while torch.jit.trace runs they are tensors, which become numbers of the trace."""
    return [int(value) for value in values] if torch.jit.is_tracing() else list(values)
