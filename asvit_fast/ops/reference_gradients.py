"""Derivatives of functions of operands some of which may be missing (None), such as biases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Reference = Callable[[Sequence[Any]], Tensor]  # of all operands, in operations that torch differentiates


def present(operands: Sequence[Tensor | None]) -> list[Tensor]:
    """The operands that are there."""
    return [x for x in operands if x is not None]


def restored(tensors: Sequence[Any], is_present: Sequence[bool]) -> list[Any]:
    """Inverse of ``present``: None for operands that are missing."""
    rest = iter(tensors)
    return [next(rest) if one else None for one in is_present]


def _vector_jacobian_product(reference: Reference, is_present: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """(gradient of the output, the operands that are there) -> their gradients, differentiable in all of them."""

    def product(gradient: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda *tensors: reference(restored(tensors, is_present)), *operands)[1](gradient)

    return product


def gradients(reference: Reference, gradient: Tensor, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the operands from that of the output; None for operands that are missing."""
    is_present = [x is not None for x in operands]
    return restored(_vector_jacobian_product(reference, is_present)(gradient, *present(operands)), is_present)


def double_backward(
    reference: Reference,
    is_present: Sequence[bool],
    needs_grad: Sequence[bool],
    saved: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """Backward pass of ``gradients``: cotangents of the gradient of the output and of each operand, differentiable
    again.

    Args:
        cotangents: those of the results of ``gradients``.
        is_present: which operands there are.
        needs_grad: which gradients the op returned; the cotangents of others mean nothing.
        saved: the gradient of the output, then the operands that are there.
    """
    gradient, *operands = saved
    cotangents = [one if want else None for one, want in zip(cotangents, needs_grad, strict=True)]
    of_present = tuple(
        torch.zeros_like(operand) if cotangent is None else cotangent
        for cotangent, operand in zip(itertools.compress(cotangents, is_present), operands, strict=True)
    )
    product = _vector_jacobian_product(reference, is_present)
    grad_gradient, *grad_operands = torch.func.vjp(product, gradient, *operands)[1](of_present)
    return grad_gradient, restored(grad_operands, is_present)
