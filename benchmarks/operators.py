"""What the scripts that benchmark single operators share: options, tables, files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from asvit_fast import backends
from asvit_fast.bench.operators import MODES, Case, Operator, OperatorRow, Work
from asvit_fast.bench.timer import print_header, save_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure(
    benchmark: str, work: Work, providers: dict[str, Operator], modes: Sequence[str], rounds: int, tolerance: float
) -> list[OperatorRow]:
    """Check every provider's output and gradients against float64, then time those that are right in turn.

    Raises:
        SystemExit: ours is wrong by more than `tolerance`; nothing is timed.
    """
    case = Case(benchmark, work, providers, tolerance)
    rows = []
    for mode in modes:
        checked = case.check(mode)
        for name, reason in checked.refused.items():
            print(f"{work.name}, {mode}: {name} left out, {reason}")
        if any(name.startswith("ours") for name in checked.wrong):
            raise SystemExit(f"{work.name}, {mode}: wrong results, nothing timed: {checked.wrong}")
        if checked.wrong:
            print(f"{work.name}, {mode}: left out, wrong by more than {tolerance:g}: {checked.wrong}")
        rows += case.time(mode, checked, rounds, replayed=True)
    return rows


def print_operator_rows(rows: list[OperatorRow], ours: str = "ours") -> None:
    """Print a table; the last two columns say how many times faster than each provider ours is, called and replayed."""
    mine = {(row.case, row.mode): row for row in rows if row.provider == ours}
    print(
        f"{'case':34} {'mode':8} {'provider':30} {'ms':>9} {'quartiles':>19} {'replay':>8} {'GB/s':>7} {'G/s':>8} "
        f"{'MiB':>8} {'error':>8} {'ours is':>8} {'replayed':>8}"
    )
    for row in rows:
        quartiles = f"{row.lower_quartile:.3f} .. {row.upper_quartile:.3f}"
        best = mine.get((row.case, row.mode))
        speed = f"{row.milliseconds / best.milliseconds:7.2f}x" if best else ""
        replays = (row.replay_milliseconds, best.replay_milliseconds) if best else (None, None)
        replayed = f"{replays[0] / replays[1]:7.2f}x" if replays[0] and replays[1] else ""
        print(
            f"{row.case:34} {row.mode:8} {row.provider:30} {row.milliseconds:9.3f} {quartiles:>19} "
            f"{row.replay_text:>8} {row.gigabytes_per_second:7.1f} {row.gigaoperations_per_second:8.2f} "
            f"{row.peak_mebibytes:8.1f} {row.error:8.1e} {speed:>8} {replayed:>8}"
        )


def operator_arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark of an operator has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the operands")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="turns per provider")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batch", type=int, default=None, help="images (default: those of each case)")
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
