"""Products of Linear layers on the CPU by our kernel or oneDNN's, with weights that are packed once for inference.

A library packs the weight of every product into the order that its innermost loop reads. Of a few rows, as the late
stages of a network have them, that takes as long as the product.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import _extension

Norm = tuple[Tensor, Tensor, float]  # LayerNorm's weight [K], bias [K] and epsilon
OWN, ONEDNN = "own", "onednn"
HALF = (torch.bfloat16, torch.float16)


def _asked(question: str) -> bool:
    """What torch's oneDNN says of itself; the op does not exist in builds without oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, question)())


# asked here, as a trace would take the question for an op of the model
_ONEDNN_HAS = {
    torch.bfloat16: _asked("_is_mkldnn_bf16_supported"),
    torch.float16: _asked("_is_mkldnn_fp16_supported"),
}


@torch.compiler.assume_constant_result  # the question to the extension would break the graph
def library(dtype: torch.dtype) -> str | None:
    """What multiplies on this processor: our kernel, oneDNN, or None for what torch chooses.

    Ours is chosen in float32, and in bfloat16 where there are instructions for its products in vectors (measured on
    Zen 3 and Zen 4). Where there are none, torch widens 16-bit operands in memory, ours in registers. oneDNN is used
    where the processor has AMX or AVX-512 FP16.
    """
    extension = _extension.extension()
    return _library(extension is not None and extension.prefers_own_products(), dtype)


@functools.cache
def _library(own: bool, dtype: torch.dtype) -> str | None:
    if own and dtype in (torch.float32, *HALF) and not _wants_onednn(dtype):
        return OWN
    return ONEDNN if torch.backends.mkldnn.is_available() and _multiplied_by_onednn(dtype) else None


def _multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of that type here: with AVX-512 bfloat16 at least, if need be by widening."""
    return dtype == torch.float32 or _ONEDNN_HAS.get(dtype, False)


def _wants_onednn(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for products in that type which our kernel does not use."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported()
    return dtype == torch.float16 and _ONEDNN_HAS[dtype]


@torch.compiler.assume_constant_result
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies numbers of that type without widening them; torch then does so, too."""
    return _has_instructions(dtype)


@functools.cache
def _has_instructions(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or _wants_onednn(dtype)
    return dtype not in HALF or _wants_onednn(dtype)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    keep: bool = False,
    by: str | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """activation(norm(x) @ weight.T + bias) + residual, by the library for their dtype -> [*, N].

    Args:
        x: [*, K], weight [N, K], of any strides, bias [N], residual [*, N]; oneDNN gets all in x's dtype.
        activation: "none" or "gelu".
        keep: the packed weight, for later products.
        by: the library, if it was asked already.
        norm: of our kernel, without a residual: the rows it reads are normalised first.
    """
    name = by or library(x.dtype)
    assert name is not None
    if name != ONEDNN:
        matrix = _packed(weight, name, x.dtype) if keep else _pack(weight, name, x.dtype)
        if norm is not None:
            return torch.ops.asvit_fast_C.norm_linear(x, *norm, matrix, weight.shape[0], bias, activation)
        return torch.ops.asvit_fast_C.linear(x, matrix, weight.shape[0], bias, residual, activation)
    bias = None if bias is None else bias.to(x.dtype).contiguous()  # whose stride oneDNN does not look at
    matrix = _packed(weight, name, x.dtype) if keep else without_gaps(weight.to(x.dtype))
    multiply = torch.ops.mkldnn._linear_pointwise
    if activation == "gelu":
        if x.dtype in HALF:
            y = multiply(x, matrix, bias, "gelu", [], "none")  # the exact one, of sums that were not rounded
        else:  # on numbers that are in the cache still, torch's is faster than oneDNN's
            y = F.gelu(multiply(x, matrix, bias, "none", [], ""))
        y = y if residual is None else y.add_(residual)
    elif residual is None:
        y = multiply(x, matrix, bias, "none", [], "")
    else:
        y = multiply.binary(x, residual.contiguous(), matrix, bias, "add")
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)  # else a view, which allows no later change


def without_gaps(weight: Tensor) -> Tensor:
    """A weight [N, K] whose rows, or columns, follow each other: of others oneDNN has a product for reference only, a
    hundred times slower."""
    return weight if weight.t().is_contiguous() else weight.contiguous()


# --------------------------------------------------------------------------- packed weights


_ATTRIBUTE = "_asvit_fast_packed"  # of a weight: it may have no weak references, or torch could not swap it
_process = 0  # counts forks: a thread of the parent may have held a lock
_watching = False  # optimizers
_steps: dict[int, int] = {}  # of optimizers, by the address of the memory that they wrote to


class _Kept:
    """A packed weight. It belongs to that weight alone: copies and files have none."""

    __slots__ = ("lock", "memory", "packed", "process", "shape", "state")

    def __init__(self, weight: Tensor) -> None:
        _watch_optimizers()
        size = torch.ops.asvit_fast_C.weight_state_size(weight)
        # what the weight is known by; no weight has the address 0
        self.state = torch.zeros(size, dtype=torch.int64, device="cpu")
        self.shape, self.process = weight.shape, _process
        # by whom, for which instruction set, the type that numbers were rounded to, after how many changes and steps
        self.packed: tuple[Tensor, str, str, torch.dtype, int, int] | None = None
        self.memory = 0  # address of what the weight is a part of
        self.lock = threading.RLock()  # also of a signal's handler that interrupts its own thread here

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # what torch.load(weights_only=True) takes

    def __deepcopy__(self, memo: Any) -> None:
        return None


def _forked() -> None:
    global _process
    _process += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _watch_optimizers() -> None:
    """Fused optimizers write to weights without a new version."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_count_steps)


@torch.compiler.disable
def _count_steps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """By memory, as weights may be views of the parameters that an optimizer has."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if type(weight) is nn.Parameter and weight.is_cpu and weight.layout == torch.strided:
                memory = weight.untyped_storage().data_ptr()
                _steps[memory] = _steps.get(memory, 0) + 1


def kept_of(weight: Tensor) -> _Kept | None:
    """What is kept of a weight."""
    kept = vars(weight).get(_ATTRIBUTE)
    return kept if type(kept) is _Kept and kept.process == _process else None


def _pack(weight: Tensor, library: str, dtype: torch.dtype) -> Tensor:
    if library == ONEDNN:
        return torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype))
    return torch.ops.asvit_fast_C.linear_pack(weight.to(dtype))


def _packed(weight: Tensor, library: str, dtype: torch.dtype) -> Tensor:
    """Of a parameter, kept as long as it lives, and packed again when it has changed; of any other tensor for this
    product alone."""
    kept, extension = kept_of(weight), _extension.extension()
    if kept is None or kept.shape != weight.shape or not weight.is_contiguous():
        plain = type(weight) is nn.Parameter and not weight.is_inference() and weight.is_contiguous()
        if not plain or extension is None:
            return without_gaps(weight.to(dtype)) if library == ONEDNN else _pack(weight, library, dtype)
        kept = _Kept(weight)
        vars(weight)[_ATTRIBUTE] = kept
    assert extension is not None
    with kept.lock:
        changes = torch.ops.asvit_fast_C.weight_changes(weight, weight._version, kept.state)
        packed, wanted = kept.packed, (library, extension.get_isa(), dtype, changes, _steps.get(kept.memory, 0))
        if packed is None or packed[1:] != wanted:
            kept.memory = weight.untyped_storage().data_ptr()
            wanted = (*wanted[:-1], _steps.get(kept.memory, 0))
            kept.packed = packed = _pack(weight.detach(), library, dtype), *wanted
        return packed[0]
