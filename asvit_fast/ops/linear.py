"""A Linear layer on the CPU through oneDNN, which torch itself uses for 16-bit but not for float32 matrix products.

torch multiplies float32 matrices with MKL, which leaves half of the vector units of AMD's processors idle; oneDNN,
which every x86 build of torch contains, does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from ..errors import InputError
from ..machine import mkl_is_narrow
from .checks import check_device, check_tensor
from .fused_op import FusedOp, Gradients, Operands, Result, Saved
from .reference_gradients import gradients
from .transforms import autocast_active

SMALL = 10**7 if mkl_is_narrow() else 4 * 10**7  # multiply-adds below which calling an op of ours costs what it gains


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``linear`` in torch's operations."""
    y = F.linear(x, weight, bias)  # [*, N]
    return F.gelu(y) if activation == "gelu" else y


# --------------------------------------------------------------------------- fused op


@dataclass(frozen=True)
class LinearConfig:
    """Arguments that are not tensors."""

    activation: str


NO_ACTIVATION, GELU = LinearConfig("none"), LinearConfig("gelu")


def _reference(operands: Operands, config: LinearConfig) -> Tensor:
    x, weight, bias = operands
    return linear_reference(x, weight, bias, config.activation)


def _fake(operands: Operands, config: LinearConfig) -> Result:
    x, weight, _ = operands
    return x.new_empty(*x.shape[:-1], *weight.shape[:-1]), x.new_empty(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x [rows, K], weight [N, K], both of any strides -> [rows, N]."""
    bias = None if bias is None else bias.contiguous()  # whose stride oneDNN does not look at
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


def _onednn(operands: Operands, config: LinearConfig) -> Result:
    x, weight, bias = operands
    rows = _product(x.reshape(-1, x.shape[-1]), weight, bias, config.activation)  # [rows, N]
    return rows.reshape(*x.shape[:-1], weight.shape[0]), x.new_empty(0)


def _onednn_backward(
    gradient: Tensor, operands: Operands, config: LinearConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    x, weight, _ = operands
    if config.activation != "none":  # never from `linear`, which applies it apart from the product then
        return gradients(lambda tensors: _reference(tensors, config), gradient, operands)
    rows, grad_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, weight.shape[0])  # [rows, K], [rows, N]
    grad_x = _product(grad_rows, weight.t()).reshape(x.shape) if needs_grad[0] else None
    grad_weight = _weight_gradient(grad_rows, rows) if needs_grad[1] else None
    return grad_x, grad_weight, grad_rows.sum(0) if needs_grad[2] else None


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient^T x [N, K]. oneDNN transposes a copy of each first, so it has to be much faster. It is up to three times
    faster when the shorter side of the result comes first; with few rows that is less than what transposing the result
    costs."""
    if not mkl_is_narrow():
        return gradient.t() @ x
    rows, outputs = gradient.shape
    if outputs <= x.shape[1] or rows < 4 * outputs:
        return _product(gradient.t(), x.t())
    return _product(x.t(), gradient.t()).t()


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own function is at least as fast on x [*, K] and weight [N, K]."""
    return x.numel() * weight.shape[0] < SMALL


def _onednn_cannot(operands: Operands, config: LinearConfig) -> str | None:
    x, weight, bias = operands
    if x.dtype != torch.float32 or autocast_active("cpu"):
        return "it is for float32; in other types torch chooses the library itself"
    if weight.dim() != 2 or x.dim() < 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return "it takes x [*, K], weight [N, K] and bias [N]"
    return "the product is small" if is_small(x, weight) else None


LINEAR = FusedOp(
    "linear",
    "x, weight, bias?",
    LinearConfig,
    reference=_reference,
    fake=_fake,
    forward={"cpu": _onednn} if torch.backends.mkldnn.is_available() else {},
    backward={"cpu": _onednn_backward},
    can_run={"cpu": _onednn_cannot},
    unread=("bias",),
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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """InputError where torch would not compute anything."""
    if activation not in ("none", "gelu"):
        raise InputError(f"linear: activation must be none or gelu, got '{activation}'")
    if x.dim() == 0 or weight.dim() not in (1, 2) or x.shape[-1] != weight.shape[-1]:
        raise InputError(f"linear: x must be [*, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    outputs = weight.shape[:-1]  # [N], or none
    if bias is not None and bias.shape != outputs and not _broadcasts(bias.shape, (*x.shape[:-1], *outputs)):
        raise InputError(f"linear: bias must be {list(outputs)}, got {list(bias.shape)}")
    autocast = autocast_active(x.device.type)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        check_device("linear", name, operand, x)
        if operand.dtype != x.dtype and not autocast:
            raise InputError(f"linear: {name} must be {x.dtype} as x is, got {operand.dtype}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x @ weight.T + bias, then GELU if asked for: x [*, K], weight [N, K], bias [N] -> [*, N].

    As ``torch.nn.functional.linear`` in every respect but speed: on the CPU large float32 products run through oneDNN,
    forward and backward; everything else is torch's own function.

    Args:
        x: [*, K].
        weight: [N, K]; bias: [N] or None.
        activation: "none" or "gelu" (exact); fused into the product where no gradient is recorded.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or an unknown activation, naming the value.
    """
    operands = (x, weight, bias)
    if has_torch_function(operands):
        return linear_reference(x, weight, bias, activation)
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight)
    if not (_is_dense(x) and _is_dense(weight)):
        return linear_reference(x, weight, bias, activation)
    _check(x, weight, bias, activation)
    if activation == "none":
        return LINEAR(operands, NO_ACTIVATION)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    return F.gelu(LINEAR(operands, NO_ACTIVATION)) if recorded else LINEAR(operands, GELU)
