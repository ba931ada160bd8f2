"""What a network returns, as scores look at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..taylor.value import Taylor

LOGITS = "logits"  # what Hugging Face's classifiers call them


def as_features(output: Any, samples: int) -> Any:
    """[n, F] of a tensor [n, ...], of the logits in a dict or an output of transformers, or of the only tensor in one
    or in a tuple.

    Raises:
        InputError: no such tensor or several, one that is not [samples, ...], or one of integers.
    """
    tensor = output if _is_tensor(output) else _tensor_of(output)
    if tensor.dim() == 0 or tensor.shape[0] != samples or not (tensor.is_floating_point() or tensor.is_complex()):
        found = f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
        raise InputError(
            f"a network must return floating-point numbers [{samples}, ...] of {samples} images, got {found}"
        )
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, Taylor))


def _tensor_of(output: Any) -> Any:
    named = dict(output) if isinstance(output, Mapping) else dict(enumerate(output if _is_sequence(output) else ()))
    tensors = {str(name): value for name, value in named.items() if _is_tensor(value)}
    if LOGITS in tensors:
        return tensors[LOGITS]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    found = f" with {', '.join(tensors)}" if tensors else ""
    raise InputError(
        f"a network must return a tensor [n, ...], or one with logits, got {type(output).__name__}{found}: "
        "score a module that returns the tensor you mean"
    )


def _is_sequence(output: Any) -> bool:
    return isinstance(output, (tuple, list))
