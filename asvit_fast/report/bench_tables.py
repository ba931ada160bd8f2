"""The rows of ``asvit-fast bench`` as a section of a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..bench.rows import OK, OUT_OF_MEMORY, BenchRow, table_lines
from ..errors import InputError
from .page import Section

NOTE = (
    "How fast networks run on one machine, measured in turn in one process. Results were held against float64 before a "
    "time counted. MACs are multiply-adds; those of a training step count three times those of inference."
)
FACTS = ("machine", "threads", "isa", "python", "torch", "triton", "asvit_fast", "commit")


def bench_section(
    path: Path,
    rows: Sequence[BenchRow],
    throughput: Callable[[Sequence[BenchRow], str], bytes],
    memory: Callable[[Sequence[BenchRow]], bytes],
) -> Section:
    """Plots and tables of the rows of a file; of those that were measured again the last count. Raises InputError when
    nothing was timed."""
    rows = list({(row.case, row.provider): row for row in rows}.values())
    timed = [row for row in rows if row.milliseconds is not None]
    if not timed:
        raise InputError(f"{str(path)!r} has no row with a time: nothing to draw")
    modes = dict.fromkeys(row.mode for row in timed)
    images = {f"{path.stem}-{mode}.png": throughput(timed_or_ended(rows), mode) for mode in modes}
    if any(row.peak_mebibytes is not None for row in timed):
        images[f"{path.stem}-memory.png"] = memory(timed_or_ended(rows))
    cases: dict[tuple[object, ...], list[BenchRow]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    tables = [_case_table(found) for found in cases.values()]
    count = f"{len(timed)} timed rows of {len({row.network for row in rows})} networks"
    return Section("Benchmark", count, "", images, [*tables, _machines(rows), _providers(rows)])


def timed_or_ended(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Rows that a plot shows."""
    return [row for row in rows if row.status in (OK, OUT_OF_MEMORY)]


def _case_table(rows: Sequence[BenchRow]):
    notes = "; ".join(f"{row.provider}: {row.status}, {row.note}" for row in rows if row.status != OK)
    header, *lines = table_lines(rows)
    return rows[0].title, notes, header, lines


def _machines(rows: Sequence[BenchRow]):
    lines = dict.fromkeys(tuple(getattr(row, name) for name in FACTS) for row in rows)
    return "Measured on", "", FACTS, list(lines)


def _providers(rows: Sequence[BenchRow]):
    lines = dict.fromkeys((row.provider, row.dtype, row.backend) for row in rows)
    peaks = dict.fromkeys((row.peak_product, row.peak_gigamacs_per_second) for row in rows if row.peak_product)
    note = "; ".join(f"peak {rate:g} GMAC/s: {name}" for name, rate in peaks)
    return "Providers", note, ("provider", "type", "runs on"), list(lines)
