"""Single ops against their peers: outputs and gradients are checked in float64 before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..cost import peak_allocation
from ..errors import first_line
from .timer import Row, Timing, compare, compare_replayed

MODES = ("forward", "backward", "both")

Operator = Callable[..., Tensor]  # tensors -> output


@dataclass(frozen=True)
class Work:
    """One operator on one shape: its operands and what it has to do at least."""

    name: str
    operands: tuple[Tensor, ...]  # those that require a gradient get one
    exact: Operator  # in float64, on the same operands
    moved_bytes: int  # that a forward pass has to read and write
    operations: float  # of a forward pass, in `unit`
    unit: str  # "score", "FLOP"


@dataclass(frozen=True)
class OperatorRow(Row):
    """A row with the pass that was timed, its rate and its memory."""

    mode: str = ""
    dtype: str = ""
    gigaoperations_per_second: float = 0.0  # of the forward pass's operations, whatever the mode
    unit: str = ""
    peak_mebibytes: float = 0.0  # allocated during the call, beyond what was there before


@dataclass
class Differentiable:
    """One provider on fixed operands, its passes ready to be timed."""

    run: Operator
    operands: tuple[Tensor, ...]
    cotangent: Tensor
    output: Tensor | None = field(default=None)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(operand for operand in self.operands if operand.requires_grad)

    def afresh(self) -> Differentiable:
        """The same on the same memory, for another stream: a forward pass that is recorded belongs to its stream, and
        so do leaves that one has seen."""
        operands = tuple(operand.detach().requires_grad_(operand.requires_grad) for operand in self.operands)
        return replace(self, operands=operands, output=None)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run(*self.operands)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(*self.operands), self.leaves, self.cotangent)

    def backward(self) -> tuple[Tensor, ...]:
        """Backward passes of one recorded forward pass."""
        if self.output is None:
            self.output = self.run(*self.operands)
        return torch.autograd.grad(self.output, self.leaves, self.cotangent, retain_graph=True)


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest deviation of any tensor, relative to the tensor's largest value."""
    pairs = zip(got, exact, strict=True)
    return max(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-300)).item() for a, b in pairs if b.numel() > 0
    )


@dataclass
class Check:
    """What a check of providers in one mode found."""

    runs: dict[str, Callable[[], object]] = field(default_factory=dict)  # that gave right results
    errors: dict[str, float] = field(default_factory=dict)  # of all that gave results
    refused: dict[str, str] = field(default_factory=dict)  # and why

    @property
    def wrong(self) -> dict[str, float]:
        return {name: error for name, error in self.errors.items() if name not in self.runs}


class Case:
    """One operator on one shape, with what it computes in float64."""

    def __init__(self, benchmark: str, work: Work, providers: Mapping[str, Operator], tolerance: float) -> None:
        self.benchmark, self.work, self.tolerance = benchmark, work, tolerance
        self.device, dtype = work.operands[0].device, work.operands[0].dtype
        self.dtype = str(dtype).removeprefix("torch.")
        wide = tuple(operand.detach().double().requires_grad_(operand.requires_grad) for operand in work.operands)
        output = work.exact(*wide)
        cotangent = torch.randn_like(output, dtype=dtype)
        leaves = [operand for operand in wide if operand.requires_grad]
        self.gradients = torch.autograd.grad(output, leaves, cotangent.double())
        self.output = output.detach()
        self.table = {name: Differentiable(run, work.operands, cotangent) for name, run in providers.items()}

    def check(self, mode: str) -> Check:
        """Run every provider once and hold it against float64."""
        found = Check()
        want = [self.output] if mode == "forward" else self.gradients
        for name, provider in self.table.items():
            run = getattr(provider, mode)
            try:
                result = run()
            except (RuntimeError, NotImplementedError) as error:
                found.refused[name] = first_line(error)[:110]
                continue
            found.errors[name] = relative_error([result] if mode == "forward" else result, want)
            if found.errors[name] < self.tolerance:
                found.runs[name] = run
        return found

    def time(self, mode: str, checked: Check, rounds: int, replayed: bool = False) -> list[OperatorRow]:
        """Time the providers that are right in turn; ``replayed``: as graphs, too, where there is a GPU."""
        memory = {name: peak_allocation(run, self.device) for name, run in checked.runs.items()}
        timings = compare(checked.runs, self.device, rounds)
        fresh = {name: getattr(self.table[name].afresh(), mode) for name in checked.runs if replayed}
        replays = compare_replayed(fresh, self.device, rounds)
        return [
            self._row(mode, name, timings[name], replays.get(name), checked.errors[name], memory[name])
            for name in checked.runs
        ]

    def _row(
        self, mode: str, name: str, timing: Timing, replay: Timing | None, error: float, memory: int
    ) -> OperatorRow:
        base = Row.of(self.benchmark, self.work.name, name, timing, self.work.moved_bytes, error, replay)
        rate = round(self.work.operations / timing.median / 1e9, 3)
        return OperatorRow(
            **vars(base), mode=mode, dtype=self.dtype, gigaoperations_per_second=rate, unit=self.work.unit,
            peak_mebibytes=round(memory / 2**20, 2),
        )  # fmt: skip
