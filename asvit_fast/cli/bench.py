"""``asvit-fast bench``: how fast networks and ops run here, against their peers."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ..backends import computing_device
from ..bench.networks import measure
from ..bench.rows import OK, BenchRow, read_rows, table_lines, write_rows
from ..bench.single_ops import check_ops, measure_op
from ..bench.sources import open_source
from ..bench.timer import machine
from ..errors import InputError
from ..files import file_errors, to_json
from ..settings import BenchSettings
from ..what import resolve
from .common import table
from .options import chosen

EXIT_NOTHING = 1  # no provider gave a time


def run(values: SimpleNamespace) -> int:
    settings = BenchSettings(**chosen(values, BenchSettings))
    show = Output(values)
    device = computing_device(settings.device)
    facts = machine(device)
    show.line("  ".join(f"{name}: {facts[name]}" for name in ("machine", "threads", "torch", "isa", "commit")))
    # what a network prints itself is not JSON
    with contextlib.redirect_stdout(sys.stderr) if show.to_stdout else contextlib.nullcontext():
        _measure(values, settings, show)
    show.end()
    return 0 if any(row.milliseconds for row in show.rows) else EXIT_NOTHING


def _measure(values: SimpleNamespace, settings: BenchSettings, show: Output) -> None:
    if values.what[0] == "op":
        for name in check_ops(values.what[1:], values.shape):
            for rows in measure_op(name, values.shape, settings, show.line):
                show.case(rows)
    elif values.shape:
        raise InputError("shape is of single ops: asvit-fast bench op window_attention --shape 7x7x32b")
    else:
        for what in values.what:
            resolve(what, foreign=True)  # a name that nobody knows is said before the first is measured
        for what in values.what:
            source = open_source(what, img_size=settings.img_size, seed=settings.seed)
            for rows in measure(source, settings, show.line, progress=not values.quiet):
                show.case(rows)


class Output:
    """The table on the terminal and the files, which hold all that is measured at any time."""

    def __init__(self, values: SimpleNamespace) -> None:
        self.to_stdout = values.json == "-"
        self.quiet = values.quiet or self.to_stdout
        self.rows: list[BenchRow] = []
        paths = [Path(path) for path in (values.csv, None if self.to_stdout else values.json) if path is not None]
        for path in paths:
            if not path.parent.is_dir():
                raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
            if path.is_dir():
                raise InputError(f"cannot write {str(path)!r}: it is a folder; name a file")
            with file_errors("write", path), tempfile.TemporaryFile(dir=path.parent):
                pass  # known before anything is measured
        self.files = {path: read_rows(path) if path.exists() else [] for path in paths}

    def line(self, text: str) -> None:
        """A line that explains; it stands above the progress bar."""
        if not self.quiet:
            tqdm.write(text)

    def case(self, rows: Sequence[BenchRow]) -> None:
        """The rows of one case."""
        self.rows += rows
        for path, before in self.files.items():
            write_rows(path, [*before, *self.rows])
        if self.to_stdout or not rows:
            return
        tqdm.write(f"\n{rows[0].title}\n{table(table_lines(rows))}")
        for row in rows:
            if row.status != OK:
                tqdm.write(f"  {row.provider}: {row.status}, {row.note}")

    def end(self) -> None:
        """What the figures mean, and what to do with them."""
        if self.to_stdout:
            print(to_json([asdict(row) for row in self.rows], indent=2))
            return
        mixed = len({row.dtype for row in self.rows}) > 1  # ONNX Runtime runs in float32, whatever was asked for
        for name, row in {row.provider: row for row in self.rows}.items():
            self.line(f"{name}: {row.backend}{f', {row.dtype}' if mixed else ''}")
        for row in {row.peak_product: row for row in self.rows if row.peak_product}.values():
            self.line(f"peak of products: {row.peak_gigamacs_per_second:g} GMAC/s ({row.dtype}, {row.peak_product})")
        for path in self.files:
            self.line(f"look at it: asvit-fast report {path}")
