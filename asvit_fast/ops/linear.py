"""A Linear layer on the CPU through oneDNN, which torch itself uses for 16-bit but not for float32 matrix products.

torch multiplies float32 matrices with MKL, which leaves half of the vector units of AMD's processors idle; oneDNN,
which every x86 build of torch contains, does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from .. import backends
from ..errors import InputError
from .checks import check_device, check_devices
from .decomposition import register_decomposition
from .transforms import autocast_active, transform_active

SMALL = 10**7  # multiply-adds below which calling an op of our own costs more than it gains


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``linear`` in torch's operations."""
    y = F.linear(x, weight, bias)  # [*, N]
    return F.gelu(y) if activation == "gelu" else y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x [*, K], weight [N, K], both of any strides -> [*, N]."""
    if bias is not None and bias.shape != weight.shape[:1]:  # oneDNN ignores it
        raise InputError(f"linear: bias must be {list(weight.shape[:1])}, got {list(bias.shape)}")
    bias = None if bias is None else bias.contiguous()  # whose stride oneDNN does not look at
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none" if activation == "gelu" else "")


if torch.backends.mkldnn.is_available():
    backends.declare("linear", {"cpu": _onednn, "reference": linear_reference}, extension=False)
else:
    backends.declare("linear", {"reference": linear_reference})

# --------------------------------------------------------------------------- fused op


@torch.library.custom_op("asvit_fast::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x [rows, K], weight [N, K] -> [rows, N]."""
    return backends.select("linear", x.device)(x, weight, bias, activation).contiguous()


@_linear.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    check_devices("linear", x, weight=weight, bias=bias)
    return x.new_empty(x.shape[0], weight.shape[0])


register_decomposition(_linear, linear_reference)


def _setup_context(ctx, inputs, output: Tensor) -> None:
    x, weight, bias, activation = inputs
    if activation != "none":
        raise RuntimeError("asvit_fast::linear: an activation has no gradient here, linear() applies it by itself")
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient: Tensor):
    """Products again, so that they can be differentiated again."""
    x, weight = ctx.saved_tensors
    to_x = _linear(gradient, weight.t(), None, "none") if ctx.needs_input_grad[0] else None
    to_weight = _weight_gradient(gradient, x) if ctx.needs_input_grad[1] else None
    to_bias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return to_x, to_weight, to_bias, None


def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient^T x [N, K]. oneDNN is up to three times faster when the shorter side of the result comes first; with few
    rows that is less than what turning the result around costs."""
    rows, outputs = gradient.shape
    if outputs <= x.shape[1] or rows < 4 * outputs:
        return _linear(gradient.t(), x.t(), None, "none")
    return _linear(x.t(), gradient.t(), None, "none").t()


_linear.register_autograd(_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------- public


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


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's float32 product is what F.linear would compute, and worth a call."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or autocast_active("cpu"):
        return False
    if weight.dim() != 2 or x.dim() < 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return x.numel() > 0 and x.numel() * weight.shape[0] >= SMALL


def _elementary(x: Tensor) -> bool:
    return backends.forced_backend() is not None and backends.select("linear", x.device) is linear_reference


def _through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The activation is part of the product unless a gradient is recorded."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    rows = x.reshape(-1, x.shape[-1])  # [rows, K]
    y = _linear(rows, weight, bias, "none" if recorded else activation).reshape(*x.shape[:-1], weight.shape[0])
    return F.gelu(y) if activation == "gelu" and recorded else y


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
    if not torch.jit.is_scripting():
        plain = has_torch_function((x, weight, bias))
        if not plain:
            _check(x, weight, bias, activation)
        if not plain and not transform_active() and _fits(x, weight, bias) and not _elementary(x):
            return _through_onednn(x, weight, bias, activation)
    return linear_reference(x, weight, bias, activation)
