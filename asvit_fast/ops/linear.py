"""A Linear layer on the CPU, with activation and residual in the product: by our kernel where that is fastest, else by
oneDNN, which every x86 build of torch contains.

torch multiplies float32 matrices with MKL, which leaves half of the vector units of AMD's newest processors idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import Parameter
from torch.overrides import has_torch_function

from ..backends import forced_backend
from ..errors import InputError
from ..machine import mkl_is_narrow
from .checks import check_device, check_tensor
from .fused_op import FusedOp, Gradients, Operands, Result, Saved, outside_of_modes
from .packed_linear import HALF, ONEDNN, OWN, Norm, has_instructions, library, product, without_gaps
from .reference_gradients import gradients
from .transforms import autocast_active, autocast_dtype, function_mode, transform_active

SMALL = 10**7 if mkl_is_narrow() else 4 * 10**7  # multiply-adds below which calling oneDNN costs what it gains
SMALL_FOR_OURS = 2 * 10**6  # and our kernel
ROWS_IN_TRAINING = 2048  # of float32 below which our kernel gains less than packing weights costs, which nobody keeps
ACTIVATIONS = ("none", "gelu")
_CAST = (torch.float32, *HALF)  # what autocast takes to its type


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``linear`` in torch's operations."""
    y = F.linear(x, weight, bias)  # [*, N]
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else residual + y


# --------------------------------------------------------------------------- fused op


@dataclass(frozen=True)
class LinearConfig:
    """Arguments that are not tensors."""

    activation: str
    keep: bool = False  # the packed weight: of a graph that was compiled for inference


def _reference(operands: Operands, config: LinearConfig) -> Tensor:
    x, weight, *added = operands
    bias, residual = (None if one is None else one.to(x.dtype) for one in added)
    return linear_reference(x, weight.to(x.dtype), bias, config.activation, residual)


def _fake(operands: Operands, config: LinearConfig) -> Result:
    x, weight, *_ = operands
    return x.new_empty(*x.shape[:-1], *weight.shape[:-1]), x.new_empty(0)


def _cpu(operands: Operands, config: LinearConfig) -> Result:
    x, weight, bias, residual = operands
    if is_small(x, weight):  # of a compiled graph for any size
        return linear_reference(x, weight, bias, config.activation, residual), x.new_empty(0)
    # not by the mode of gradients: autograd switches them off here
    keep = config.keep or torch.is_inference_mode_enabled()
    return product(x, weight, bias, config.activation, residual, keep), x.new_empty(0)


def _cpu_backward(
    gradient: Tensor, operands: Operands, config: LinearConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    x, weight, *_ = operands
    if config.activation != "none":  # never from `linear`, which applies it apart from the product then
        return gradients(lambda tensors: _reference(tensors, config), gradient, operands)
    rows, grad_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, weight.shape[0])  # [rows, K], [rows, N]
    grad_x = product(gradient, weight.t()) if needs_grad[0] else None
    grad_weight = _weight_gradient(grad_rows, rows) if needs_grad[1] else None
    grad_bias = grad_rows.sum(0) if needs_grad[2] else None
    return grad_x, grad_weight, grad_bias, gradient.clone() if needs_grad[3] else None


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient^T x [N, K]. oneDNN transposes a copy of each first, so it has to be much faster. It is up to three times
    faster when the shorter side of the result comes first; with few rows that is less than what transposing the result
    costs."""
    if not has_instructions(x.dtype) and library(x.dtype) != ONEDNN:
        return (gradient.float().t() @ x.float()).to(x.dtype)
    if not mkl_is_narrow():
        return gradient.t() @ x
    rows, outputs = gradient.shape
    if outputs <= x.shape[1] or rows < 4 * outputs:
        return _onednn(gradient.t(), x.t())
    return _onednn(x.t(), gradient.t()).t()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, without_gaps(weight), None, "none", [], "")


def is_small(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether torch's own function is at least as fast on x [*, K] and weight [N, K], multiplied in x's dtype or in
    another."""
    dtype = dtype or x.dtype
    return _is_small(x, weight, dtype, library(dtype))


def _is_small(x: Tensor, weight: Tensor, dtype: torch.dtype, by: str | None) -> bool:
    of_mkl = dtype == torch.float32 and by == ONEDNN  # otherwise torch's product is slow, or is oneDNN's too
    return x.numel() * weight.shape[0] < (SMALL if of_mkl else SMALL_FOR_OURS)


def _is_torchs(dtype: torch.dtype, keep: bool) -> bool:
    """Whether torch's own products in that type are as fast as ours, which keep packed weights or do not."""
    by = library(dtype)
    return by is None or (not keep and dtype in HALF and (by == ONEDNN or has_instructions(dtype)))


def _cpu_cannot(operands: Operands, config: LinearConfig) -> str | None:
    x, weight, bias, residual = operands
    if autocast_active("cpu") or _is_torchs(x.dtype, config.keep):
        return f"in {str(x.dtype).removeprefix('torch.')} torch chooses the library itself"
    if weight.dim() != 2 or x.dim() < 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return "it takes x [*, K], weight [N, K] and bias [N]"
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        return "it takes a residual of the output's shape"
    small = is_small(x, weight)
    if torch.compiler.is_compiling():  # no other graph for another size
        small = statically_known_true(small)
    return "the product is small" if small else None


LINEAR = FusedOp(
    "linear",
    "x, weight, bias?, residual?",
    LinearConfig,
    reference=_reference,
    fake=_fake,
    forward={"cpu": _cpu} if torch.backends.mkldnn.is_available() else {},
    backward={"cpu": _cpu_backward},
    can_run={"cpu": _cpu_cannot},
    unread=("bias", "residual"),
    of_torch=True,
)

# --------------------------------------------------------------------------- public


def _is_dense(x: Tensor) -> bool:
    """Not sparse, not nested."""
    return x.layout == torch.strided and not x.is_nested


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be added to one of the other shape."""
    sides = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(side in (1, other) for side, other in sides)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    """InputError where torch would not compute anything."""
    if activation not in ACTIVATIONS:
        raise InputError(f"linear: activation must be none or gelu, got '{activation}'")
    if x.dim() == 0 or weight.dim() not in (1, 2) or x.shape[-1] != weight.shape[-1]:
        raise InputError(f"linear: x must be [*, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    outputs = weight.shape[:-1]  # [N], or none
    result = (*x.shape[:-1], *outputs)
    if bias is not None and bias.shape != outputs and not _broadcasts(bias.shape, result):
        raise InputError(f"linear: bias must be {list(outputs)}, got {list(bias.shape)}")
    if residual is not None and residual.shape != result:
        raise InputError(f"linear: residual must be {list(result)}, got {list(residual.shape)}")
    autocast = autocast_active(x.device.type)
    for name, operand in (("weight", weight), ("bias", bias), ("residual", residual)):
        if operand is None:
            continue
        check_device("linear", name, operand, x)
        if operand.dtype != x.dtype and not autocast:
            raise InputError(f"linear: {name} must be {x.dtype} as x is, got {operand.dtype}")


def _in_inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    norm: Norm | None = None,
) -> Tensor | None:
    """The result by a library, with a packed weight that is kept for later products, if it is for one and nothing looks
    at the call: with fewer checks than the op, which on small batches cost as much as the product. With a norm before
    it, if it is for our kernel."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return None
    if type(weight) is not Parameter or not weight.is_cpu or not (_is_dense(x) and _is_dense(weight)):
        return None
    if torch.jit.is_tracing():  # which would take what is asked about sizes into the trace
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    by = library(dtype)
    if by is None or activation not in ACTIVATIONS:
        return None
    if not _fits(x, weight, bias, residual, _CAST if autocast else (dtype,)):
        return None
    if _is_small(x, weight, dtype, by) or not _is_alone(weight, bias, residual):
        return None
    if norm is not None:
        if by != OWN or autocast or not _is_norm_of(x, norm):
            return None
        return product(x, weight, bias, activation, keep=True, by=by, norm=norm)
    x = x.to(dtype) if autocast else x
    if residual is None or residual.dtype == dtype:
        return product(x, weight, bias, activation, residual, keep=True, by=by)
    return residual + product(x, weight, bias, activation, keep=True, by=by)


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> bool:
    """Whether shapes and dtypes are those of a product x [*, K], weight [N, K], bias [N], residual [*, N]."""
    shape = x.shape
    if x.dtype not in dtypes or weight.dtype not in dtypes or weight.dim() != 2 or len(shape) < 2:
        return False
    outputs, inputs = weight.shape
    if shape[-1] != inputs or not (bias is None or _is_one(bias, dtypes, (outputs,))):
        return False
    return residual is None or _is_one(residual, dtypes, (*shape[:-1], outputs))


def _is_one(operand: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> bool:
    return operand.dtype in dtypes and operand.shape == shape and operand.is_cpu and _is_dense(operand)


def _is_norm_of(x: Tensor, norm: Norm) -> bool:
    """Whether these are what LayerNorm of the rows of x takes."""
    return all(
        type(one) is Parameter and one.dtype == x.dtype and one.is_cpu and one.shape == x.shape[-1:] for one in norm[:2]
    )


def _is_alone(weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether no tracer, transform, mode or subclass of Tensor looks at a product, and any backend may run it."""
    seen = transform_active() or function_mode() is not None or forced_backend() is not None
    return not seen and outside_of_modes((weight, bias, residual))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """residual + activation(x @ weight.T + bias): x [*, K], weight [N, K], bias [N], residual [*, N] -> [*, N].

    As ``torch.nn.functional.linear``, but faster: on the CPU large products run through our kernel or
    oneDNN, forward and backward; everything else is torch's own function. In inference the weight of a parameter is
    packed once, and again when it has changed: by its version, its address, and some of its numbers. What is written
    through ``weight.data`` has no version, and may go unseen where it changes few of the numbers: write under
    ``torch.no_grad()``.

    Args:
        x: [*, K].
        weight: [N, K]; bias: [N] or None.
        activation: "none" or "gelu" (exact); fused into the product where no gradient is recorded.
        residual: [*, N], added in the product, or None.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or an unknown activation, naming the value.

    Examples:
        >>> import torch, asvit_fast as af
        >>> x, weight, bias = torch.randn(2, 196, 96), torch.randn(384, 96), torch.randn(384)
        >>> y = af.ops.linear(x, weight, bias, activation="gelu")
        >>> torch.allclose(y, torch.nn.functional.gelu(x @ weight.T + bias), atol=1e-4)
        True
    """
    found = _in_inference(x, weight, bias, activation, residual)
    if found is not None:
        return found
    operands = (x, weight, bias, residual)
    if has_torch_function(operands) or function_mode() is not None:
        return linear_reference(x, weight, bias, activation, residual)
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight)
    if not (_is_dense(x) and _is_dense(weight)):
        return linear_reference(x, weight, bias, activation, residual)
    _check(x, weight, bias, activation, residual)
    if not autocast_active(x.device.type):
        return _linear(x, weight, bias, activation, residual)
    if transform_active():  # whose tangents may be of another type than values
        return linear_reference(x, weight, bias, activation, residual)
    dtype = autocast_dtype("cpu") if x.device.type == "cpu" else None
    if dtype is not None and x.dtype != torch.float64 and not _is_torchs(dtype, _keeps()):
        with torch.autocast("cpu", enabled=False):  # torch's product in that type is slow, or packs its weight anew
            y = _linear(x.to(dtype), weight, bias, activation, None)
    else:
        y = _linear(x, weight, bias, activation, None)
    return y if residual is None else residual + y  # which may be of another type


def norm_linear(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor | None:
    """activation(LayerNorm(x) @ weight.T + bias) -> [*, N] in one pass over x [*, K], where inference goes through our
    kernel: the rows of a tile are normalised when it reads them. None where it does not."""
    return _in_inference(x, weight, bias, activation, None, norm)


def _keeps() -> bool:
    """Whether weights of a graph that is being compiled shall be packed once."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _has_few_rows(x: Tensor) -> bool:
    """Whether torch's product of x [*, K] and its gradients are faster than ours with weights that are not kept."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or torch.jit.is_tracing():  # one graph for any size
        return False
    return x.numel() < ROWS_IN_TRAINING * x.shape[-1] and library(x.dtype) == OWN


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """Where a gradient is recorded, activation and residual are torch's."""
    operands = (x, weight, bias, residual)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)):
        return LINEAR(operands, LinearConfig(activation, _keeps()))
    y = F.linear(x, weight, bias) if _has_few_rows(x) else LINEAR((x, weight, bias, None), LinearConfig("none"))
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else residual + y
