"""Tanh's Taylor rule: one pass that pushes a value and its derivatives through y = tanh(x).

With x(t) the input along a curve, y' = (1 - y^2) x' and y'' = (1 - y^2) (x'' - 2 y x'^2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.ops.decomposition import register_decomposition
from asvit_fast.ops.stacked import chain_rule, check_stack, compute_dtype, gradients
from asvit_fast.ops.transforms import transform_active

# --------------------------------------------------------------------------- reference


def tanh_taylor_reference(x: Tensor) -> Tensor:
    """`tanh_taylor` in elementary torch operations: any device, any transform, differentiable any number of times."""
    rows = x.to(compute_dtype(x))  # [orders + 1, ...]
    y = torch.tanh(rows[0])
    first = 1 - y * y
    return chain_rule(rows, y, first, -2 * y * first).to(x.dtype)


# --------------------------------------------------------------------------- fused op


def _compiled(x: Tensor) -> Tensor:
    """C++ on the CPU, CUDA on a GPU: csrc/unary_taylor.cpp."""
    _extension.extension()
    return torch.ops.asvit_fast_C.tanh_taylor(x)


backends.declare("tanh_taylor", cuda=_compiled, cpu=_compiled, reference=tanh_taylor_reference)


@torch.library.custom_op("asvit_fast::tanh_taylor", mutates_args=())
def _tanh_taylor(x: Tensor) -> Tensor:
    return backends.select("tanh_taylor", x.device)(x)


@_tanh_taylor.register_fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_decomposition(_tanh_taylor, tanh_taylor_reference)

# --------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> Tensor | None:
    return gradients(tanh_taylor_reference, ctx.saved_tensors, gradient)[0]


_tanh_taylor.register_autograd(_backward, setup_context=_setup_context)

# --------------------------------------------------------------------------- public


def tanh_taylor(x: Tensor) -> Tensor:
    """Tanh of a value and of its first derivatives along a curve, in one pass.

    Args:
        x: [orders + 1, ...], the value, then 0, 1 or 2 derivatives with respect to t (not divided by factorials);
            float32, float64, float16 or bfloat16 (the latter two computed in float32).

    Returns:
        The same for y = tanh(x): [orders + 1, ...], contiguous, of x's dtype. NaN passes through.

    Raises:
        InputError: if x has no or more than 3 rows or is not floating point.
    """
    check_stack("tanh_taylor", x)
    if transform_active():
        return tanh_taylor_reference(x)
    return _tanh_taylor(x)
