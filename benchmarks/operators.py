"""Helpers of the benchmarks of single operators: modes, the check before the clock, memory, rows with rates."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timer import Row, Timing, compare, print_header, save_rows
from torch import Tensor

from asvit_fast import backends
from asvit_fast.cost import peak_allocation

MODES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

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


def measure(
    benchmark: str, work: Work, providers: dict[str, Operator], modes: Sequence[str], rounds: int, tolerance: float
) -> list[OperatorRow]:
    """Check every provider's output and gradients against float64, then time them in turn.

    Raises:
        SystemExit: one is wrong by more than `tolerance`; nothing is timed.
    """
    device, dtype = work.operands[0].device, work.operands[0].dtype
    wide = tuple(operand.detach().double().requires_grad_(operand.requires_grad) for operand in work.operands)
    output = work.exact(*wide)
    cotangent = torch.randn_like(output, dtype=dtype)
    leaves = [operand for operand in wide if operand.requires_grad]
    exact = torch.autograd.grad(output, leaves, cotangent.double())
    output = output.detach()
    table = {name: Differentiable(run, work.operands, cotangent) for name, run in providers.items()}
    rows = []
    for mode in modes:
        want = [output] if mode == "forward" else exact
        runs = {name: getattr(provider, mode) for name, provider in table.items()}
        errors = {}
        for name, run in list(runs.items()):
            try:
                found = run()
            except (RuntimeError, NotImplementedError) as error:
                print(f"{work.name}, {mode}: {name} left out, {str(error).splitlines()[0][:110]}")
                del runs[name]
                continue
            errors[name] = relative_error([found] if mode == "forward" else found, want)
        wrong = {name: value for name, value in errors.items() if not value < tolerance}
        if wrong:
            raise SystemExit(f"{work.name}, {mode}: wrong results, nothing timed: {wrong}")
        memory = {name: peak_allocation(run, device) for name, run in runs.items()}
        timings = compare(runs, device, rounds)
        rows += [_row(benchmark, work, mode, name, timings[name], errors[name], memory[name]) for name in runs]
    return rows


def _row(benchmark: str, work: Work, mode: str, name: str, timing: Timing, error: float, memory: int) -> OperatorRow:
    base = Row.of(benchmark, work.name, name, timing, work.moved_bytes, error)
    rate = round(work.operations / timing.median / 1e9, 3)
    dtype = str(work.operands[0].dtype).removeprefix("torch.")
    return OperatorRow(
        **vars(base), mode=mode, dtype=dtype, gigaoperations_per_second=rate, unit=work.unit,
        peak_mebibytes=round(memory / 2**20, 2),
    )  # fmt: skip


def print_operator_rows(rows: list[OperatorRow], ours: str = "ours") -> None:
    """Print a table; the last column says how many times faster than each provider ours is."""
    mine = {(row.case, row.mode): row.milliseconds for row in rows if row.provider == ours}
    print(
        f"{'case':34} {'mode':8} {'provider':30} {'ms':>9} {'quartiles':>19} {'GB/s':>7} {'G/s':>8} {'MiB':>8} "
        f"{'error':>8} {'ours is':>8}"
    )
    for row in rows:
        quartiles = f"{row.lower_quartile:.3f} .. {row.upper_quartile:.3f}"
        speed = f"{row.milliseconds / mine[row.case, row.mode]:7.2f}x" if (row.case, row.mode) in mine else ""
        print(
            f"{row.case:34} {row.mode:8} {row.provider:30} {row.milliseconds:9.3f} {quartiles:>19} "
            f"{row.gigabytes_per_second:7.1f} {row.gigaoperations_per_second:8.2f} {row.peak_mebibytes:8.1f} "
            f"{row.error:8.1e} {speed:>8}"
        )


def operator_arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark of an operator has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the operands")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="turns per provider")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    return parser


def start(arguments: argparse.Namespace) -> torch.device:
    """The device of a run, after its header is printed."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = backends.resolve_device(arguments.device)
    print_header(device)
    return device


def publish(rows: list[OperatorRow], csv: Path | None, device: torch.device) -> None:
    """Print the rows of a case and append them to the CSV file, if there is one."""
    print_operator_rows(rows)
    if csv is not None:
        save_rows(csv, list(rows), device)
