"""Windowed attention along a curve against what torch offers for the same derivatives.

    python benchmarks/bench_window_attention_taylor.py [--device cpu|cuda] [--threads 2] [--rounds 10] [--csv FILE]

Shapes are those of the four stages of a seed topology (224 x 224, 10 curve points). Every provider is checked against
float64 before anything is timed; if one is wrong, the program ends with exit code 1.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from asvit_fast import _extension, backends
from asvit_fast.bench.timer import Row, compare, compare_replayed, print_header, print_rows, save_rows
from asvit_fast.ops.window_attention_taylor import window_attention_taylor
from asvit_fast.ops.windows import merge_windows, partition_windows, split_heads

TOLERANCE = 2e-5  # relative to the largest value of an order, in float32

Rows = tuple[Tensor, ...]  # (y, y', y''), each [B, H, W, heads*d]; a stack of them does as well
Run = Callable[[], Tensor | Rows]


@dataclass(frozen=True)
class Case:
    """Attention of one stage."""

    name: str
    batch: int
    side: int  # tokens of the square map
    window: int
    heads: int
    head_dim: int

    def attend(self, qkv: Tensor) -> Tensor:
        """As a user of torch writes it: qkv [B, H, W, 3*heads*d] -> [B, H, W, heads*d]."""
        window, size = [self.window] * 2, [self.side] * 2
        q, k, v = split_heads(partition_windows(qkv, window, [0, 0]), self.heads)  # [B, windows, heads, tokens, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return merge_windows(out.transpose(2, 3).flatten(3), size, window, [0, 0])

    def ours(self, qkv: Tensor) -> Tensor:
        """Our op on [orders + 1, B, H, W, 3*heads*d]."""
        return window_attention_taylor(qkv, self.heads, (self.window, self.window))


CASES = [
    Case("stage 1", 10, 56, 28, 4, 8),
    Case("stage 2", 10, 28, 28, 8, 8),
    Case("stage 3", 10, 14, 14, 16, 8),
    Case("stage 4", 10, 7, 7, 32, 8),
]


def along_curve(attend: Callable[[Tensor], Tensor], *rows: Tensor) -> Rows:
    """Attention and its derivatives along the curve by (nested) torch.func.jvp."""
    if len(rows) == 2:
        return torch.func.jvp(attend, rows[:1], rows[1:])

    def first(x: Tensor, x1: Tensor) -> Rows:
        return torch.func.jvp(attend, (x,), (x1,))

    (value, velocity), (_, acceleration) = torch.func.jvp(first, rows[:2], rows[1:])
    return value, velocity, acceleration


def with_isa(isa: str, run: Run) -> Tensor | Rows:
    """Our CPU kernel with one instruction set."""
    extension = _extension.extension()
    before = extension.get_isa()
    extension.set_isa(isa)
    try:
        return run()
    finally:
        extension.set_isa(before)


def with_backend(backend: str, run: Run) -> Tensor | Rows:
    """Our op with one backend."""
    with backends.use_backend(backend):
        return run()


def with_math(run: Run) -> Tensor | Rows:
    """The only attention of torch that has forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return run()


def compiled_peer(case: Case, rows: Rows) -> Run | None:
    """torch.func.jvp through torch.compile, if that works."""
    run = partial(with_math, partial(torch.compile(partial(along_curve, case.attend), dynamic=False), *rows))
    try:
        run()
    except Exception as error:
        print(f"torch.func.jvp, compiled: left out, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None
    return run


def providers(case: Case, qkv: Tensor, compiled: bool) -> dict[str, Run]:
    """Who takes part, by name, ready to run on qkv [orders + 1, ...]; torch.func gets and returns separate rows."""
    rows = tuple(row.clone() for row in qkv)
    table: dict[str, Run] = {"torch.func.jvp, eager": partial(with_math, partial(along_curve, case.attend, *rows))}
    peer = compiled_peer(case, rows) if compiled else None
    if peer is not None:
        table["torch.func.jvp, compiled"] = peer
    run = partial(case.ours, qkv)
    table["reference, eager"] = partial(with_backend, "reference", run)
    extension = _extension.extension()
    if qkv.device.type == "cpu" and extension is not None:
        table |= {f"ours, {isa}": partial(with_isa, isa, run) for isa in extension.available_isas()}
    if qkv.device.type == "cuda":
        why = backends.available("window_attention_taylor", "cuda", qkv.device)
        if why is None:
            table["ours, cuda"] = partial(with_backend, "cuda", run)
        else:
            print(f"ours, cuda: left out, {why}")
    return table


def error(y: Tensor | Rows, expected: Tensor) -> float:
    """Largest deviation of any order, relative to the order's largest value."""
    rows = zip(y, expected, strict=True)
    return max(((row.double() - exact).abs().max() / exact.abs().max()).item() for row, exact in rows)


def run_case(case: Case, orders: int, device: torch.device, rounds: int, compiled: bool) -> list[Row]:
    """Check and time every provider on one shape."""
    channels = 3 * case.heads * case.head_dim
    qkv = torch.randn(orders + 1, case.batch, case.side, case.side, channels, device=device)
    with torch.no_grad():
        with backends.use_backend("reference"):
            expected = case.ours(qkv.double())
        table = providers(case, qkv, compiled)
        errors = {name: error(run(), expected) for name, run in table.items()}
        wrong = {name: value for name, value in errors.items() if not value < TOLERANCE}
        if wrong:
            raise SystemExit(f"wrong results, nothing timed: {wrong}")
        timings, replays = compare(table, device, rounds), compare_replayed(table, device, rounds)
    moved = (qkv.numel() + qkv.numel() // 3) * qkv.element_size()  # read qkv, write the output
    name = f"{case.name}, {case.window}x{case.window} tokens, order {orders}"
    return [
        Row.of("window_attention_taylor", name, who, timings[who], moved, errors[who], replays.get(who))
        for who in table
    ]


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="turns per provider")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    torch.manual_seed(0)
    print_header(device)
    for case in [case for case in CASES if arguments.case in case.name]:
        for orders in (1, 2):
            torch.compiler.reset()
            rows = run_case(case, orders, device, arguments.rounds, not arguments.no_compile)
            print_rows(rows, baseline="torch.func.jvp, eager")
            if arguments.csv is not None:
                save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
