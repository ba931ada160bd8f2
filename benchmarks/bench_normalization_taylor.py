"""Taylor rules of LayerNorm, softmax, tanh and square against what torch offers for the same, and against memcpy.

    python benchmarks/bench_normalization_taylor.py [--device cpu|cuda] [--threads 2] [--rounds 20] [--csv FILE]

Shapes are those of a seed topology (224 x 224, 10 curve points): block norms of the four stages, norms of merged
neighbourhoods; for softmax those of timm's unfused attention. Every provider is checked against float64 before anything
is timed; if one is wrong, the program ends with exit code 1. "copy" reads and writes the same bytes, the least the work
can take. torch's nested forward mode through its LayerNorm is wrong (pytorch/pytorch#196700), so order 2 takes it
decomposed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.bench.timer import Row, compare, compare_replayed, print_header, print_rows, save_rows
from asvit_fast.ops import layer_norm_taylor, softmax_taylor, square_taylor, tanh_taylor
from asvit_fast.ops.layer_norm_taylor import layer_norm_taylor_reference
from asvit_fast.ops.softmax_taylor import softmax_taylor_reference
from asvit_fast.ops.square_taylor import square_taylor_reference
from asvit_fast.ops.tanh_taylor import tanh_taylor_reference

TOLERANCE = 2e-5  # relative to the largest value of a row, in float32

Function = Callable[[Tensor], Tensor]
Rows = tuple[Tensor, ...]  # (x, x', x''), each [...]; a stack of them [orders + 1, ...] does as well
Run = Callable[[], Tensor | Rows]


@dataclass(frozen=True)
class Op:
    """One op with its peers."""

    ours: Function
    reference: Function
    torch: Function  # torch's own, order 1
    plain: Function  # whose nested forward mode is right
    shapes: tuple[tuple[int, ...], ...]


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm as torch has it."""
    return F.layer_norm(x, x.shape[-1:])


def plain_layer_norm(x: Tensor) -> Tensor:
    """LayerNorm in plain PyTorch operations."""
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return torch.softmax(x, -1)


BLOCK_NORMS = ((10, 56, 56, 32), (10, 28, 28, 64), (10, 14, 14, 128), (10, 7, 7, 256))
MERGE_NORMS = ((10, 28 * 28, 512), (10, 14 * 14, 1024), (10, 7 * 7, 2048))
SCORES = ((10, 3, 197, 197), (10, 12, 197, 197), (10 * 64, 3, 49, 49))  # ViT-Ti, ViT-B, first stage of Swin-T
OPS = {
    "layer_norm": Op(
        layer_norm_taylor, layer_norm_taylor_reference, layer_norm, plain_layer_norm, BLOCK_NORMS + MERGE_NORMS
    ),
    "softmax": Op(softmax_taylor, softmax_taylor_reference, softmax, softmax, SCORES),
    "tanh": Op(tanh_taylor, tanh_taylor_reference, torch.tanh, torch.tanh, ((10, 256), (10, 56, 56, 32))),
    "square": Op(square_taylor, square_taylor_reference, torch.square, torch.square, ((10, 256), (10, 56, 56, 32))),
}


def along_curve(op: Op, *rows: Tensor) -> Rows:
    """The function and its derivatives along the curve by (nested) torch.func.jvp."""
    if len(rows) == 2:
        return torch.func.jvp(op.torch, rows[:1], rows[1:])

    def first(x: Tensor, x1: Tensor) -> Rows:
        return torch.func.jvp(op.plain, (x,), (x1,))

    (value, velocity), (_, acceleration) = torch.func.jvp(first, rows[:2], rows[1:])
    return value, velocity, acceleration


def with_isa(isa: str, run: Function, x: Tensor) -> Tensor:
    """Our CPU kernel with one instruction set."""
    extension = _extension.extension()
    before = extension.get_isa()
    extension.set_isa(isa)
    try:
        return run(x)
    finally:
        extension.set_isa(before)


def with_backend(backend: str, run: Function, x: Tensor) -> Tensor:
    """Our op with one backend."""
    with backends.use_backend(backend):
        return run(x)


def providers(op: Op, x: Tensor) -> dict[str, Run]:
    """Who takes part, by name, ready to run on x [orders + 1, ...]; torch.func gets and returns separate rows."""
    rows = tuple(row.clone() for row in x)
    table: dict[str, Run] = {
        "torch.func.jvp, eager": partial(along_curve, op, *rows),
        "reference, eager": partial(op.reference, x),
    }
    extension = _extension.extension()
    if x.device.type == "cpu" and extension is not None:
        table |= {f"ours, {isa}": partial(with_isa, isa, op.ours, x) for isa in extension.available_isas()}
    if x.device.type == "cuda":
        table["ours, cuda"] = partial(with_backend, "cuda", op.ours, x)
    return table


def error(y: Tensor | Rows, expected: Rows) -> float:
    """Largest deviation of any row, relative to the row's largest value."""
    rows = zip(y, expected, strict=True)
    return max(((row.double() - exact).abs().max() / exact.abs().max()).item() for row, exact in rows)


def run_case(name: str, shape: tuple[int, ...], orders: int, device: torch.device, rounds: int) -> list[Row]:
    """Check and time every provider on one shape."""
    op = OPS[name]
    x = torch.randn(orders + 1, *shape, device=device)
    exact = Op(op.ours, op.reference, op.plain, op.plain, op.shapes)
    expected = along_curve(exact, *x.double().unbind(0))
    table = providers(op, x)
    errors = {provider: error(run(), expected) for provider, run in table.items()}
    wrong = {provider: value for provider, value in errors.items() if not value < TOLERANCE}
    if wrong:
        raise SystemExit(f"wrong results, nothing timed: {wrong}")
    table |= {"copy": x.clone}
    timings, replays = compare(table, device, rounds), compare_replayed(table, device, rounds)
    moved = 2 * x.numel() * x.element_size()  # read every row, write every row
    case = f"{name} {list(shape)} order {orders}"
    return [
        Row.of("normalization_taylor", case, provider, timing, moved, errors.get(provider, 0.0), replays.get(provider))
        for provider, timing in timings.items()
    ]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=20, help="turns per provider")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="which ops")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    torch.manual_seed(0)
    print_header(device)
    rows = [
        row
        for name in arguments.ops
        for shape in OPS[name].shapes
        for orders in (1, 2)
        for row in run_case(name, shape, orders, device, arguments.rounds)
    ]
    print_rows(rows, baseline="torch.func.jvp, eager")
    if arguments.csv is not None:
        save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
