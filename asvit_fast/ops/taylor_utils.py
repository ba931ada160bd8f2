"""Helpers of the Taylor ops, which map a stack x [orders + 1, ...] of a value and its derivatives along a curve."""

from __future__ import annotations

import torch
from torch import Tensor

from asvit_fast.errors import InputError
from asvit_fast.ops.checks import check_device, check_floats, check_tensor


def check_stack(op: str, x: Tensor) -> None:
    """InputError unless x [orders + 1, ...] is floating point and has 0 to 2 orders."""
    check_tensor(op, "x", x)
    if x.dim() == 0 or not 1 <= x.shape[0] <= 3:
        raise InputError(f"{op}: x must be [orders + 1, ...] with 0 to 2 orders, got shape {tuple(x.shape)}")
    check_floats(op, "x", x)


def check_rows(op: str, x: Tensor) -> None:
    """InputError unless x [orders + 1, ..., C] has a last dimension of its own, and C >= 1."""
    check_stack(op, x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise InputError(f"{op}: x must be [orders + 1, ..., C] with C >= 1, got shape {tuple(x.shape)}")


def check_channels(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """InputError unless `vector` is None, or [C] of any floating dtype on x's device, for x [orders + 1, ..., C]."""
    if vector is None:
        return
    check_tensor(op, name, vector)
    if x.dim() < 2 or vector.shape != x.shape[-1:]:
        shapes = f"got shape {tuple(vector.shape)} for x {tuple(x.shape)}"
        raise InputError(f"{op}: {name} must be [C] for x [orders + 1, ..., C], {shapes}")
    check_floats(op, name, vector)
    check_device(op, name, vector, x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in single precision."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def add_to_value(y: Tensor, bias: Tensor) -> Tensor:
    """y [orders + 1, *shape] with a constant added, which does not move: to the value only."""
    return torch.cat([(y[0] + bias).unsqueeze(0), y[1:]])


def chain_rule(x: Tensor, value: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """The stack [orders + 1, ...] of f(x(t)), given f, f' and f'' at x(0), each [...].

    `first` is not needed for 0 orders, `second` not below 2 orders; None there means that f'' is 0.
    """
    orders = [value]
    if len(x) >= 2:
        assert first is not None
        orders.append(first * x[1])
        if len(x) == 3:
            orders.append(first * x[2] if second is None else first * x[2] + second * x[1] * x[1])
    return torch.stack(orders)
