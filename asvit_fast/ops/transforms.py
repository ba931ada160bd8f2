"""Which of torch's transforms and modes are active, as far as ops have to know."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad


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
