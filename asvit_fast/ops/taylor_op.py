"""A Taylor op, declared once: a function of stacks [orders + 1, ...] of a value and its derivatives along a curve.

    TANH = taylor_op("tanh_taylor", tanh_taylor_reference)
    y = TANH(x)

The reference says everything: its signature is that of the op, its derivatives are the op's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension, backends
from .checks import check_devices
from .decomposition import register_decomposition
from .fused_op import outside_of_modes
from .reference_gradients import gradients
from .transforms import transform_active

Function = Callable[..., Tensor]


def taylor_op(
    name: str,
    reference: Function,
    *,
    triton: Function | None = None,
    fake: Function | None = None,
    adjoint: Callable[..., Sequence[Tensor | None]] | None = None,
    can_run: Mapping[str, backends.CanRun] | None = None,
) -> Function:
    """Define ``asvit_fast::name`` and return what calls it, with positional arguments.

    Args:
        name: of the op, and of the compiled ones for CPU and GPU.
        reference: in operations of torch, differentiable any number of times; its first argument is a tensor.
        triton: an implementation in Triton, where there is one.
        fake: the output of tensors without data; by default one like the first argument.
        adjoint: (gradient of the output, arguments) -> gradients of those that are tensors, in operations of torch; by
            default that of the reference.
        can_run: by backend, (arguments, None) -> why it cannot run on them; None if it can.
    """
    signature = inspect.signature(reference).parameters
    names, defaults = tuple(signature), tuple(parameter.default for parameter in signature.values())
    others = {} if triton is None else {"triton": triton}
    compiled = _compiled(name)
    implementations = {**others, "cuda": compiled, "cpu": compiled, "reference": reference}
    backends.declare(name, implementations, can_run=can_run)

    def run(*arguments: Any) -> Tensor:
        backend = backends.choose(name, arguments[0].device, arguments)
        return backends.implementation(name, backend)(*arguments, *defaults[len(arguments) :]).contiguous()

    def without_data(*arguments: Any) -> Tensor:
        named = zip(names, arguments, strict=False)  # torch.library leaves out what has its default
        check_devices(name, arguments[0], **{key: x for key, x in named if isinstance(x, Tensor)})
        if fake is not None:
            return fake(*arguments)
        return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)

    def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """In operations of torch, so that it can be differentiated again."""
        grads: list[Tensor | None] = [None] * len(ctx.others)
        if adjoint is not None:
            arguments = _filled(ctx.others, ctx.places, ctx.saved_tensors)
            new = adjoint(gradient, *arguments, *defaults[len(arguments) :])
        else:
            new = gradients(
                lambda tensors: reference(*_filled(ctx.others, ctx.places, tensors)), gradient, ctx.saved_tensors
            )
        for place, one in zip(ctx.places, new, strict=True):
            grads[place] = one
        return tuple(grads)

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"asvit_fast::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(without_data)
    op.register_autograd(differentiate, setup_context=save)
    register_decomposition(op, reference)

    def call(*arguments: Any) -> Tensor:
        if transform_active():
            return reference(*arguments)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if recorded or torch.compiler.is_compiling() or not outside_of_modes(tensors):
            return op(*arguments)
        return run(*arguments)

    return call


def _compiled(name: str) -> Function:
    """C++ on a CPU, CUDA on a GPU: csrc."""

    def run(*arguments: Any) -> Tensor:
        _extension.extension()
        return getattr(torch.ops.asvit_fast_C, name)(*arguments)

    return run


def _filled(others: Sequence[Any], places: Sequence[int], tensors: Sequence[Any]) -> list[Any]:
    arguments = list(others)
    for place, x in zip(places, tensors, strict=True):
        arguments[place] = x
    return arguments
