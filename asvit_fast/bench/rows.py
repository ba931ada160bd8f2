"""Rows of benchmarks of networks: what they hold, as tables, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import file_errors, from_json, to_json, write_atomic

OK, WRONG, OUT_OF_MEMORY, FAILED = "ok", "wrong", "out of memory", "failed"


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One provider of one network, in one mode, with one size of a batch. What was not measured is None.

    Attributes:
        network: as it was named.
        provider: source, ours, compiled, ...; ``backend``: what it ran on, in words.
        mode: inference, or train: forward and backward of a step.
        batch: images; ``image``: shape of one.
        precision: that was asked for: fp32, bf16, fp16, amp bf16, ...; ``channels_last``: as was the memory format.
        dtype: that the provider runs in.
        status: ok, wrong (its error is above the tolerance, it was not timed), out of memory (the end of its sizes), or
            failed; ``note`` says why.
        images_per_second: by the median time.
        milliseconds: median of a batch, with its quartiles; ``rounds``: turns that they are of.
        peak_mebibytes: largest memory of a call, beyond what was there before.
        gigamacs_per_second: multiply-adds; those of a backward pass count as two forward passes.
        share_of_peak: part of the machine's measured rate of products in this type, which is
            ``peak_gigamacs_per_second`` and was reached by ``peak_product``.
        share_of_roofline: of a single op, the least time by the machine's rate of products and bandwidth / its time.
        error: relative distance of all outputs, or of all gradients, from those of the source in float64.
        machine: processor or GPU; ``threads``: of torch; ``isa``: of our kernels on a CPU; versions; the commit.

    Examples:
        >>> import asvit_fast as af
        >>> rows = af.benchmark("test_vit", batch_sizes=1, modes="inference", against="source", progress=False)
        >>> rows[0].network, rows[0].mode, rows[0].batch, rows[0].precision
        ('test_vit', 'inference', 1, 'fp32')
    """

    network: str
    provider: str
    backend: str
    mode: str
    batch: int
    image: str
    precision: str
    channels_last: bool
    dtype: str
    status: str = OK
    note: str = ""
    images_per_second: float | None = None
    milliseconds: float | None = None
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    rounds: int | None = None
    peak_mebibytes: float | None = None
    gigamacs_per_second: float | None = None
    share_of_peak: float | None = None
    peak_gigamacs_per_second: float | None = None
    peak_product: str = ""
    share_of_roofline: float | None = None
    error: float | None = None
    machine: str
    threads: str
    isa: str
    python: str
    torch: str
    triton: str
    asvit_fast: str
    commit: str

    @property
    def case(self) -> tuple[Any, ...]:
        """What rows that are compared have in common."""
        return (
            self.network, self.mode, self.batch, self.image, self.precision, self.channels_last, self.machine,
            self.threads,
        )  # fmt: skip

    @property
    def title(self) -> str:
        """The case in words."""
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.network}, {self.mode}, batch {self.batch}, {self.image}, {self.precision}{layout}"


COLUMNS = [column.name for column in fields(BenchRow)]
_TYPES = {column.name: str(column.type) for column in fields(BenchRow)}
_READERS: dict[str, Any] = {
    "str": str, "int": int, "bool": lambda text: {"True": True, "False": False}[str(text)],
    "float": float,
}  # fmt: skip


def read_rows(path: Path) -> list[BenchRow]:
    """The rows of a CSV or JSON file that ``write_rows`` wrote. Raises InputError for any other file."""
    with file_errors("read", path):
        content = path.read_bytes()
    try:
        text = content.decode()
        if text.lstrip().startswith("["):
            records = from_json(text)
        else:
            table = csv.DictReader(io.StringIO(text, newline=""))
            records = list(table)
            if table.fieldnames != COLUMNS:
                raise ValueError(f"its columns are {', '.join(table.fieldnames or ['none'])}")
        return [_row(record) for record in records]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} holds no rows of asvit-fast bench ({error}); remove it, or name another file"
        ) from None


def _row(record: dict[str, Any]) -> BenchRow:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        value, kind = record[name], _TYPES[name]
        empty = value is None or (value == "" and kind.endswith("None"))
        values[name] = None if empty else _READERS[kind.partition(" ")[0]](value)
    return BenchRow(**values)


def write_rows(path: Path, rows: Sequence[BenchRow]) -> None:
    """Write rows, as JSON where the name ends with .json, else as CSV: the whole file in one step."""
    if path.suffix == ".json":
        text = "[\n" + ",\n".join(f"  {to_json(asdict(row))}" for row in rows) + "\n]\n"
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        text = buffer.getvalue()
    write_atomic(path, text)


HEADER = ("provider", "images/s", "quartiles", "ms", "MiB", "GMAC/s", "of peak", "error", "speed")


def table_lines(rows: Iterable[BenchRow]) -> list[tuple[str, ...]]:
    """A header, and a line for each row of one case; the speed is relative to the source, else to the first."""
    rows = list(rows)
    timed = [row for row in rows if row.milliseconds]
    base = next((row for row in timed if row.provider == "source"), timed[0] if timed else None)
    of_op = any(row.share_of_roofline is not None for row in rows)
    return [_header(of_op), *(_line(row, base) for row in rows)]


def _header(of_op: bool) -> tuple[str, ...]:
    return tuple("of roofline" if of_op and name == "of peak" else name for name in HEADER)


def _line(row: BenchRow, base: BenchRow | None) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.milliseconds is None or row.lower_quartile is None or row.upper_quartile is None or base is None:
        return row.provider, row.status, *[""] * (len(HEADER) - 4), error, ""
    share = row.share_of_peak if row.share_of_roofline is None else row.share_of_roofline
    slow, fast = (1e3 * row.batch / quartile for quartile in (row.upper_quartile, row.lower_quartile))
    return (
        row.provider,
        f"{row.images_per_second:.4g}",
        f"{slow:.4g} .. {fast:.4g}",
        f"{row.milliseconds:.4g}",
        "" if row.peak_mebibytes is None else f"{row.peak_mebibytes:.4g}",
        "" if row.gigamacs_per_second is None else f"{row.gigamacs_per_second:.4g}",
        "" if share is None else f"{100 * share:.0f} %",
        error,
        f"{(base.milliseconds or 0) / row.milliseconds:.2f}x",
    )
