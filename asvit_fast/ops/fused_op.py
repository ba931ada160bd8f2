"""An op of ours, declared once: what it computes, what computes it on each backend, and what it is for torch.

    PATCH_MERGE = FusedOp(
        "patch_merge", "x, weight, norm_weight, norm_bias?, bias?", PatchMergeConfig, reference=_reference, fake=_fake,
        forward={"triton": _triton, "cpu": _compiled}, backward={"triton": ..., "cpu": ...}, can_run={"triton": ...},
    )
    output = PATCH_MERGE((x, weight, norm_weight, None, None), PatchMergeConfig(...))

From this come the custom ops ``asvit_fast::patch_merge`` and ``asvit_fast::patch_merge_gradients``, their meta
functions and decompositions for torch.compile, torch.export and dispatch modes such as FlopCounterMode, and derivatives
of any order, the second and higher ones through the reference. Eager calls outside of all modes skip torch.library,
whose dispatch takes longer than a small kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .. import backends
from ..errors import InputError
from .checks import check_devices
from .decomposition import register_decomposition
from .reference_gradients import double_backward, gradients, present, restored
from .transforms import traced_for_onnx, transform_active

Operands = Sequence[Any]  # tensors; None for those that are optional and missing
Result = tuple[Tensor, Tensor]  # output; what the backward pass reads of the forward pass, or an empty tensor
Reference = Callable[[Operands, Any], Tensor]  # (operands, config) -> output
Forward = Callable[[Operands, Any], Result]
Gradients = Sequence[Tensor | None]  # of the operands
Saved = tuple[Any, Tensor]  # Result, the output only where the op's backward pass reads it
# (gradient of the output, operands, config, Saved, needs_grad of each operand) -> Gradients; the others may be anything
Backward = Callable[[Tensor, Operands, Any, Saved, list[bool]], Gradients]

_SCHEMA = {
    "int": "SymInt", "float": "float", "bool": "bool", "str": "str", "list[int]": "SymInt[]",
    "torch.dtype": "ScalarType",
}  # fmt: skip
_PLAIN = (Tensor, nn.Parameter)


class FusedOp:
    """A differentiable op with an implementation for each backend.

    Args:
        name: of the op, ``asvit_fast::name``.
        operands: names of its tensors, with a question mark for those that may be None.
        config: a frozen dataclass of everything else: int, float, bool, str, list[int], torch.dtype.
        reference: the output in operations of torch, differentiable any number of times.
        forward, backward: implementations by backend, best first.
        fake: shapes and dtypes of the result, for tensors without data.
        composite: further implementations in operations of torch, which differentiate themselves.
        can_run: by backend, why it cannot run on these operands with this config; None if it can.
        saved: what the reference's forward pass hands on, so that any backend can run the backward pass.
        needs_output: whether a backward pass reads the output.
        unread: operands whose values no gradient depends on: they may change before the backward pass.
        of_torch: whether all implementations are functions of torch, see ``backends.declare``.
    """

    def __init__(
        self,
        name: str,
        operands: str,
        config: type,
        *,
        reference: Reference,
        forward: Mapping[str, Forward],
        backward: Mapping[str, Backward],
        fake: Forward,
        composite: Mapping[str, Reference] | None = None,
        can_run: Mapping[str, backends.CanRun] | None = None,
        saved: Callable[[Operands, Any], Tensor] | None = None,
        needs_output: bool = False,
        unread: Sequence[str] = (),
        of_torch: bool = False,
    ) -> None:
        self.name, self.config, self.reference, self.fake = name, config, reference, fake
        self.saved, self.needs_output, self.of_torch = saved, needs_output, of_torch
        declared = [part.strip() for part in operands.split(",")]
        self.operands = tuple(part.rstrip("?") for part in declared)
        self.unread = [self.operands.index(name) for name in unread]
        self.backward = {**backward, "reference": self._reference_backward}
        self.composite = {**(composite or {}), "reference": reference}
        implementations = {**forward, **(composite or {}), "reference": self._reference_forward}
        backends.declare(name, implementations, can_run=can_run, of_torch=of_torch)
        arguments = dataclasses.fields(config)
        fields = [f"{_SCHEMA[str(field.type)]} {field.name}" for field in arguments]
        defaults = ["" if field.default is dataclasses.MISSING else f"={field.default}" for field in arguments]
        tensors = [f"Tensor{'?' if part.endswith('?') else ''} {part.rstrip('?')}" for part in declared]
        self._fields = tuple(field.name for field in arguments)
        optional = [f"{field}{default}" for field, default in zip(fields, defaults, strict=True)]
        self._op = self._custom_op(", ".join([*tensors, *optional]))._opoverload
        self._backward_op = self._custom_backward_op(", ".join([*tensors, *fields]))._opoverload

    def __call__(self, operands: Operands, config: Any) -> Tensor:
        """The output. The arguments have been checked."""
        is_empty, needs_grad, is_plain = _look_at(operands)
        if is_empty or transform_active():
            return self.reference(operands, config)
        device = operands[0].device
        if device.type == "meta" and not self.of_torch and backends.forced_backend() is None:  # for shape and FLOPs
            return self._op(*operands, *self._values(config))[0]
        backend = backends.choose(self.name, device, operands, config)
        if backend in self.composite:
            return self.composite[backend](operands, config)
        if torch.compiler.is_compiling() or not is_plain or _inside_a_mode():
            if traced_for_onnx():
                raise InputError(
                    f"torch.onnx.export(..., dynamo=False) does not know {self.name}: "
                    "export with dynamo=True, or call asvit_fast.restore(model) first"
                )
            if self.of_torch and any(map(_is_subclass, operands)):  # DTensor knows how to share torch's own function
                return self.reference(operands, config)
            return self._op(*operands, *self._values(config))[0]
        if needs_grad and torch.is_grad_enabled():
            return _Eager.apply(self, backend, config, *operands)
        return self.forward(backend, operands, config)[0]

    def forward(self, backend: str, operands: Operands, config: Any) -> Result:
        """The result on a backend; its output may be changed in place, which autograd refuses for views."""
        output, saved = backends.implementation(self.name, backend)(operands, config)
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output, saved

    # ------------------------------------------------------------------ reference

    def _reference_forward(self, operands: Operands, config: Any) -> Result:
        output = self.reference(operands, config).contiguous()
        return output, output.new_empty(0) if self.saved is None else self.saved(operands, config)

    def _reference_backward(
        self, gradient: Tensor, operands: Operands, config: Any, result: Any, needs_grad: list[bool]
    ) -> Gradients:
        return gradients(lambda tensors: self.reference(tensors, config), gradient, operands)

    # ------------------------------------------------------------------ for torch.library

    def _backend(self, operands: Operands, config: Any) -> str:
        """The backend that a custom op runs on: the reference where the one that was traced does not exist."""
        backend = backends.choose(self.name, operands[0].device, operands, config)
        return backend if backend in self.backward else "reference"

    def _values(self, config: Any) -> tuple[Any, ...]:
        return tuple(getattr(config, name) for name in self._fields)

    def _split(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
        """Arguments of the custom op -> operands, config."""
        count = len(self.operands)
        return tuple(arguments[:count]), self.config(*arguments[count : count + len(self._fields)])

    def _check_devices(self, operands: Operands, **others: Tensor | None) -> None:
        first, *rest = operands
        check_devices(self.name, first, **dict(zip(self.operands[1:], rest, strict=True)), **others)

    def _custom_op(self, schema: str) -> Any:
        def run(*arguments: Any) -> Result:
            operands, config = self._split(arguments)
            return self.forward(self._backend(operands, config), operands, config)

        def fake(*arguments: Any) -> Result:
            operands, config = self._split(arguments)
            self._check_devices(operands)
            return self.fake(operands, config)

        def decomposition(*arguments: Any) -> Result:
            operands, config = self._split(arguments)
            return self.reference(operands, config).contiguous(), self.fake(operands, config)[1]

        op = torch.library.custom_op(
            f"asvit_fast::{self.name}", run, mutates_args=(), schema=f"({schema}) -> (Tensor, Tensor)"
        )
        op.register_fake(fake)
        op.register_autograd(self._differentiate, setup_context=self._save)
        register_decomposition(op, decomposition)
        return op

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Result) -> None:
        operands, ctx.config = self._split(inputs)
        ctx.is_present = [x is not None for x in operands]
        ctx.save_for_backward(*(output if self.needs_output else output[1:]), *present(operands))
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(self._fields)
        if gradient is None:
            return (*(None for _ in self.operands), *nothing)
        *output, saved, operands = self._saved(ctx)
        needs_grad = list(ctx.needs_input_grad[: len(self.operands)])
        if _is_batch(gradient):
            return (*self._gradients_of_batch(gradient, operands, ctx.config, needs_grad), *nothing)
        grads = self._backward_op(
            gradient, *(output or (None,)), saved, *operands, *self._values(ctx.config), needs_grad
        )
        return (*(new if want else None for new, want in zip(grads, needs_grad, strict=True)), *nothing)

    def _saved(self, ctx: Any) -> Sequence[Any]:
        count, tensors = 2 if self.needs_output else 1, ctx.saved_tensors  # read once: checkpoints give them once
        return (*tensors[:count], restored(tensors[count:], ctx.is_present))

    def _gradients_of_batch(
        self, gradient: Tensor, operands: Operands, config: Any, needs_grad: list[bool]
    ) -> list[Tensor | None]:
        """In operations of torch, which have rules for batches of gradients (``is_grads_batched``)."""
        pairs = zip(operands, needs_grad, strict=True)
        with torch.enable_grad():
            leaves: list[Any] = [None if x is None else x.detach().requires_grad_(want) for x, want in pairs]
            output = self.reference(leaves, config)
        found = iter(torch.autograd.grad(output, list(itertools.compress(leaves, needs_grad)), gradient))
        return [next(found) if want else None for want in needs_grad]

    def _custom_backward_op(self, schema: str) -> Any:
        def run(gradient: Tensor, output: Tensor | None, saved: Tensor, *arguments: Any) -> list[Tensor]:
            operands, config = self._split(arguments)
            grads = self.gradients(
                self._backend(operands, config), gradient, operands, config, (output, saved), arguments[-1]
            )
            return [gradient.new_empty(0) if new is None else new for new in grads]

        def fake(gradient: Tensor, output: Tensor | None, saved: Tensor, *arguments: Any) -> list[Tensor]:
            operands, _ = self._split(arguments)
            self._check_devices(operands, gradient=gradient, output=output, saved=saved)
            return [
                gradient.new_empty(0) if not want else old.new_empty(old.shape)
                for old, want in zip(operands, arguments[-1], strict=True)
            ]

        op = torch.library.custom_op(
            f"asvit_fast::{self.name}_gradients", run, mutates_args=(),
            schema=f"(Tensor grad_output, Tensor? output, Tensor saved, {schema}, bool[] needs_grad) -> Tensor[]",
        )  # fmt: skip
        op.register_fake(fake)
        op.register_autograd(self._differentiate_twice, setup_context=self._save_twice)
        return op

    def gradients(
        self, backend: str, gradient: Tensor, operands: Operands, config: Any, result: Saved,
        needs_grad: list[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of the operands that need one, contiguous and in their dtypes; None for the others."""
        grads = self.backward[backend](gradient, operands, config, result, needs_grad)
        return [
            new.to(old.dtype).contiguous() if want and new is not None else None
            for new, old, want in zip(grads, operands, needs_grad, strict=True)
        ]

    def _save_twice(self, ctx: Any, inputs: Sequence[Any], output: list[Tensor]) -> None:
        operands, ctx.config = self._split(inputs[3:])
        ctx.is_present, ctx.needs_grad = [x is not None for x in operands], inputs[-1]
        ctx.save_for_backward(inputs[0], *present(operands))

    def _differentiate_twice(self, ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """In operations of torch, so that it can be differentiated again."""
        grad_gradient, grad_operands = double_backward(
            lambda tensors: self.reference(tensors, ctx.config),
            ctx.is_present,
            ctx.needs_grad,
            ctx.saved_tensors,
            cotangents,
        )
        return (grad_gradient, None, None, *grad_operands, *(None for _ in self._fields), None)


class _Eager(torch.autograd.Function):
    """The op outside of torch.library. Its backward pass runs on the forward pass's backend, unless one is forced."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp, backend: str, config: Any, *operands: Any) -> Tensor:
        output, saved = op.forward(backend, operands, config)
        ctx.op, ctx.backend, ctx.config = op, backend, config
        kept = list(operands)
        for place in op.unread:  # without autograd's check of their version
            kept[place] = None if kept[place] is None else kept[place].data
        ctx.save_for_backward(output if op.needs_output else None, saved, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, saved, *operands = ctx.saved_tensors
        op, needs_grad = ctx.op, list(ctx.needs_input_grad[3:])
        if _is_batch(gradient):
            grads = op._gradients_of_batch(gradient, operands, ctx.config, needs_grad)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():  # it will be differentiated, or is traced
            grads = op._backward_op(gradient, output, saved, *operands, *op._values(ctx.config), needs_grad)
            grads = [new if want else None for new, want in zip(grads, needs_grad, strict=True)]
        else:
            backend = ctx.backend if backends.forced_backend() is None else op._backend(operands, ctx.config)
            grads = op.gradients(backend, gradient, operands, ctx.config, (output, saved), needs_grad)
        return (None, None, None, *grads)


def _is_batch(gradient: Tensor) -> bool:
    """Whether it stands for a batch of gradients, of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _look_at(operands: Operands) -> tuple[bool, bool, bool]:
    """Whether one has no elements, one needs a gradient, and all are torch's own with data, in one go: a generator for
    each question would take as long as a small kernel."""
    is_empty, needs_grad, is_plain = False, False, True
    for x in operands:
        if x is not None:
            is_empty = is_empty or x.numel() == 0
            needs_grad = needs_grad or x.requires_grad
            is_plain = is_plain and type(x) in _PLAIN and not x.is_meta
    return is_empty, needs_grad, is_plain


def _is_subclass(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x) not in _PLAIN and not isinstance(x, FakeTensor)


def _inside_a_mode() -> bool:
    """Whether a tracer or a dispatch mode looks at calls."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def outside_of_modes(operands: Operands) -> bool:
    """Whether nothing but autograd looks at the call: no tracer, no dispatch mode, no subclass of Tensor."""
    return _look_at(operands)[2] and not _inside_a_mode()


def no_float64(*tensors: Tensor) -> str | None:
    """Why kernels that compute in float32 cannot run."""
    for x in tensors:
        if x.dtype == torch.float64:
            return "it computes in float32, got torch.float64"
    return None
