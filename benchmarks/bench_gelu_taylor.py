"""GELU's Taylor rule against what torch offers for the same derivatives.

    python benchmarks/bench_gelu_taylor.py [--device cpu|cuda] [--threads 2] [--rounds 30] [--csv FILE]

Shapes are those of the MLP's hidden layer in the four stages of a seed topology (224 x 224, 10 curve points). Every
provider is checked against float64 before anything is timed; if one is wrong, the program ends with exit code 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.bench.timer import Row, compare, compare_replayed, print_header, print_rows, save_rows
from asvit_fast.ops.gelu_taylor import gelu_taylor, gelu_taylor_reference

SHAPES = [(10, 56, 56, 96), (10, 28, 28, 192), (10, 14, 14, 384), (10, 7, 7, 768)]
TOLERANCE = 1e-5  # relative to the largest value of a row, in float32

Rows = tuple[Tensor, ...]  # (x, x', x''), each [...]; a stack of them [orders + 1, ...] does as well
Run = Callable[[], Tensor | Rows]


def along_curve(*rows: Tensor) -> Rows:
    """GELU and its derivatives along the curve by (nested) torch.func.jvp."""
    if len(rows) == 2:
        return torch.func.jvp(F.gelu, rows[:1], rows[1:])

    def first(x: Tensor, x1: Tensor) -> Rows:
        return torch.func.jvp(F.gelu, (x,), (x1,))

    (value, velocity), (_, acceleration) = torch.func.jvp(first, rows[:2], rows[1:])
    return value, velocity, acceleration


def with_isa(isa: str, x: Tensor) -> Tensor:
    """Our CPU kernel with one instruction set."""
    extension = _extension.extension()
    before = extension.get_isa()
    extension.set_isa(isa)
    try:
        return gelu_taylor(x)
    finally:
        extension.set_isa(before)


def with_backend(backend: str, x: Tensor) -> Tensor:
    """Our op with one backend."""
    with backends.use_backend(backend):
        return gelu_taylor(x)


def providers(x: Tensor, compiled: bool) -> dict[str, Run]:
    """Who takes part, by name, ready to run on x [orders + 1, ...]; torch.func gets and returns separate rows."""
    rows = tuple(row.clone() for row in x)
    table: dict[str, Run] = {
        "torch.func.jvp, eager": partial(along_curve, *rows),
        "reference, eager": partial(gelu_taylor_reference, x),
    }
    if compiled:
        compile = partial(torch.compile, fullgraph=True, dynamic=False)
        table["torch.func.jvp, compiled"] = partial(compile(along_curve), *rows)
        table["reference, compiled"] = partial(compile(gelu_taylor_reference), x)
    extension = _extension.extension()
    if x.device.type == "cpu" and extension is not None:
        table |= {f"ours, {isa}": partial(with_isa, isa, x) for isa in extension.available_isas()}
    for backend in ("cuda", "triton") if x.device.type == "cuda" else ():
        why = backends.available("gelu_taylor", backend, x.device)
        if why is None:
            table[f"ours, {backend}"] = partial(with_backend, backend, x)
        else:
            print(f"ours, {backend}: left out, {why}")
    return table


def truth(x: Tensor) -> Tensor:
    """GELU and its derivatives along the curve in float64, written out."""
    x = x.double()
    cdf = 0.5 * torch.erfc(-x[0] / math.sqrt(2))
    density = torch.exp(-0.5 * x[0] ** 2) / math.sqrt(2 * math.pi)
    first, second = cdf + x[0] * density, (2 - x[0] ** 2) * density
    return torch.stack([x[0] * cdf, first * x[1], *([first * x[2] + second * x[1] ** 2] if len(x) == 3 else [])])


def error(y: Tensor | Rows, expected: Tensor) -> float:
    """Largest deviation of any row, relative to the row's largest value."""
    rows = zip(y, expected, strict=True)
    return max(((row.double() - exact).abs().max() / exact.abs().max()).item() for row, exact in rows)


def run_case(shape: tuple[int, ...], orders: int, device: torch.device, rounds: int, compiled: bool) -> list[Row]:
    """Check and time every provider on one shape."""
    x = torch.randn(orders + 1, *shape, device=device)
    expected = truth(x)
    table = providers(x, compiled)
    errors = {name: error(run(), expected) for name, run in table.items()}
    wrong = {name: value for name, value in errors.items() if not value < TOLERANCE}
    if wrong:
        raise SystemExit(f"wrong results, nothing timed: {wrong}")
    timings, replays = compare(table, device, rounds), compare_replayed(table, device, rounds)
    moved = 2 * x.numel() * x.element_size()  # read every row, write every row
    case = f"{list(shape)} order {orders}"
    return [Row.of("gelu_taylor", case, name, timings[name], moved, errors[name], replays.get(name)) for name in table]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=30, help="turns per provider")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    torch.manual_seed(0)
    print_header(device)
    rows = [
        row
        for shape in SHAPES
        for orders in (1, 2)
        for row in run_case(shape, orders, device, arguments.rounds, not arguments.no_compile)
    ]
    print_rows(rows, baseline="torch.func.jvp, eager")
    if arguments.csv is not None:
        save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
