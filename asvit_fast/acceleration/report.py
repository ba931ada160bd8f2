"""The report of ``accelerate``: every module that it considered, and what runs the ops."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import InputError
from ..ops.packed_linear import ONEDNN, library
from .unknown import HOW_TO_ADD, Unknown

SHOWN_NAMES = 2  # modules named per row
SHOWN_ROWS = 8  # rows per part of the report
WIDTH = 120  # columns
BACKENDS = {
    "triton": "Triton kernels",
    "cuda": "CUDA kernels",
    "cpu": "compiled CPU kernels",
    "reference": "plain PyTorch",
}


@dataclass(frozen=True)
class Decision:
    """The decision on one module."""

    name: str  # in the model
    source: str  # its class
    replacement: str | None  # the class that it has now, None if it was left
    reason: str | None  # why it was left
    nothing_to_gain: bool = False  # left because it would not be faster, whatever the model and the machine


@dataclass(frozen=True)
class OpRun:
    """The backend that runs an op for the modules on one device in one precision."""

    op: str
    device: str
    dtype: str
    backend: str  # "triton", "cuda", "cpu", "reference"
    missing: str | None  # why nothing faster runs, and how to get it

    def __str__(self) -> str:
        runs = BACKENDS[self.backend]
        if (self.op, self.backend) == ("linear", "cpu") and library(getattr(torch, self.dtype)) == ONEDNN:
            runs = "oneDNN"
        return f"on {self.device} in {self.dtype}: {runs}{f', as {self.missing}' if self.missing else ''}"


Row = tuple[int, str, str]  # how many modules, their class, what is said of them


@dataclass(frozen=True, repr=False)
class Report:
    """Every module of a known class, and what runs the ops; ``print`` it for a summary that fits a screen."""

    decisions: tuple[Decision, ...]
    ops: tuple[OpRun, ...] = ()
    unknown: tuple[Unknown, ...] = ()  # windowed attention that no family claims

    @property
    def swapped(self) -> list[Decision]:
        """The modules that have a fused class now."""
        return [decision for decision in self.decisions if decision.replacement is not None]

    @property
    def left(self) -> list[Decision]:
        """The modules that could be faster and stay as they are for a reason in this model or machine."""
        return [d for d in self.decisions if d.replacement is None and not d.nothing_to_gain]

    @property
    def nothing_to_gain(self) -> list[Decision]:
        """The modules of known classes that would not be faster as they are used here."""
        return [decision for decision in self.decisions if decision.nothing_to_gain]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the numbers of modules swapped and left, "ops", "modules" and "unknown"."""
        return {
            "swapped": len(self.swapped),
            "left": len(self.left),
            "ops": [asdict(run) for run in self.ops],
            "modules": [asdict(decision) for decision in self.decisions],
            "unknown": [asdict(kind) for kind in self.unknown],
        }

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame with a row for each module.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_dataframe needs pandas, which is not installed: pip install pandas") from None
        return pandas.DataFrame([asdict(d) for d in self.decisions], columns=list(Decision.__dataclass_fields__))

    def __repr__(self) -> str:
        return f"<Report: {self._summary()}>"

    def _summary(self) -> str:
        swapped = len(self.swapped)
        if not self.decisions:
            return "0 modules accelerated: none is of a known class (asvit_fast.accelerate lists them in FAMILIES)"
        if swapped == 0:
            return f"0 modules accelerated: nothing here would be faster ({len(self.left)} left, for the reasons given)"
        return f"{swapped} modules accelerated, {len(self.left)} left as they are"

    def _parts(self) -> list[tuple[str, list[Row]]]:
        """The title and the rows of every part that is not empty."""
        parts = [
            ("accelerated", _grouped(self.swapped, lambda d: f"-> {d.replacement}", names=False)),
            ("left as they are", _grouped(self.left, _reason)),
            ("nothing to gain", _grouped(self.nothing_to_gain, _reason, names=False)),
        ]
        return [(title, rows) for title, rows in parts if rows]

    def __str__(self) -> str:
        lines = [self._summary()]
        for title, rows in self._parts():
            width = max(len(name) for _, name, _ in rows[:SHOWN_ROWS])
            lines.append(f"{title}:")
            lines += [_cut(f"  {count:>4} {name:<{width}}  {text}") for count, name, text in rows[:SHOWN_ROWS]]
            if len(rows) > SHOWN_ROWS:
                lines.append(f"  and {sum(row[0] for row in rows[SHOWN_ROWS:])} more: see to_dict()")
        if self.unknown:
            lines += ["windowed attention that is not known:", *(f"  {text}" for text in self._unknown_lines())]
        lines += ["ops:", *(f"  {names} {what}" for names, what in self._op_rows())] if self.ops else []
        return "\n".join(lines)

    def _unknown_lines(self) -> list[str]:
        """The class and file of each, why it is not recognised, and how to add it."""
        lines = []
        for kind in self.unknown[:SHOWN_ROWS]:
            lines.append(f"{len(kind.modules):>4} {kind.source.rpartition('.')[2]}  {kind.file}")
            lines += [_cut(f"     {kind.reason}")] if kind.reason else []
        return [*lines, HOW_TO_ADD]

    def _op_rows(self) -> list[tuple[str, str]]:
        """(ops, what runs them)."""
        rows: dict[str, list[str]] = {}
        for run in self.ops:
            rows.setdefault(str(run), []).append(run.op)
        return [(", ".join(names), what) for what, names in rows.items()]

    def why_left(self) -> str:
        """All of `left` in one line."""
        return "; ".join(f"{count} {source}: {text}" for count, source, text in _grouped(self.left, _reason))

    def _repr_html_(self) -> str:
        rows = [(title, str(count), name, text) for title, part in self._parts() for count, name, text in part]
        rows += [("ops", "", names, what) for names, what in self._op_rows()]
        rows += [("not known", str(len(kind.modules)), kind.source, kind.reason or HOW_TO_ADD) for kind in self.unknown]
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        head = "<tr><th></th><th>modules</th><th>class</th><th></th></tr>"
        return f"<table><caption>{html.escape(self._summary())}</caption>{head if rows else ''}{cells}</table>"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _reason(decision: Decision) -> str:
    return decision.reason or ""


def _grouped(decisions: Iterable[Decision], text: Callable[[Decision], str], names: bool = True) -> list[Row]:
    """A row for each class and text, the largest first; `names`: with those of the first modules."""
    decisions = list(decisions)
    counts = Counter((d.source.rpartition(".")[2], text(d)) for d in decisions)
    rows = []
    for (source, said), count in counts.most_common():
        of_row = [d.name or "the model" for d in decisions if (d.source.rpartition(".")[2], text(d)) == (source, said)]
        rows.append((count, source, f"{said} ({_listed(of_row)})" if names else said))
    return rows


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown}, ..."
