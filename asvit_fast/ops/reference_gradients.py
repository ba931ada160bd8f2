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


def restored(tensors: Sequence[Any], there: Sequence[bool]) -> list[Any]:
    """The reverse: None where nothing is ``there``."""
    rest = iter(tensors)
    return [next(rest) if one else None for one in there]


def _vector_jacobian_product(reference: Reference, there: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """(gradient of the output, the operands that are there) -> their gradients, differentiable in all of them."""

    def product(gradient: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda *given: reference(restored(given, there)), *operands)[1](gradient)

    return product


def gradients(reference: Reference, gradient: Tensor, operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of each operand from that of the output; None for what is missing."""
    there = [x is not None for x in operands]
    return restored(_vector_jacobian_product(reference, there)(gradient, *present(operands)), there)


def double_backward(
    reference: Reference,
    there: Sequence[bool],
    asked: Sequence[bool],
    saved: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """From ``cotangents`` of an op's ``gradients`` those of the gradient of the output and of each operand;
    differentiable again.

    Args:
        there: which operands there are.
        asked: which gradients the op returned; the cotangents of others mean nothing.
        saved: the gradient of the output, then the operands that are there.
    """
    gradient, *operands = saved
    given = [one if want else None for one, want in zip(cotangents, asked, strict=True)]
    known = tuple(
        torch.zeros_like(operand) if cotangent is None else cotangent
        for cotangent, operand in zip(itertools.compress(given, there), operands, strict=True)
    )
    to_gradient, *found = torch.func.vjp(_vector_jacobian_product(reference, there), gradient, *operands)[1](known)
    return to_gradient, restored(found, there)
