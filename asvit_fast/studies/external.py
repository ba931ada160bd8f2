"""Topologies of a study that somebody else chose, and accuracies of networks that were trained elsewhere: CSV files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..files import file_errors
from ..topology import Topology


def read_topologies(path: str | os.PathLike[str]) -> list[Topology]:
    """The different topologies in the column ``topology`` of a file, such as a search's top.csv, in their order.

    Raises InputError as ``read_accuracies`` does.
    """
    return list(dict.fromkeys(topology for topology, _ in _lines(Path(path), ("topology",))))


def read_accuracies(path: str | os.PathLike[str]) -> dict[Topology, list[float]]:
    """Accuracies (larger is better) of each topology, in the order of the file; a topology may have several lines.

    The file has a header with ``topology`` and ``accuracy``; other columns are left alone. An empty accuracy, nan or
    inf stands for a training that diverged.

    Raises:
        InputError: a file that cannot be read, has no such columns, or a line that cannot be understood, naming it.
    """
    found: dict[Topology, list[float]] = {}
    for topology, row in _lines(Path(path), ("topology", "accuracy")):
        try:
            found.setdefault(topology, []).append(_number(row["accuracy"]))
        except InputError as error:
            raise InputError(f"{path}: {topology}: {error}") from None
    return found


def _lines(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[Topology, dict[str, str]]]:
    """The topology and all columns of every line, one at least."""
    empty = True
    with file_errors("read", path), open(path, newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}; its first line must name {','.join(columns)}"
                )
            for row in reader:
                empty = False
                try:
                    yield Topology.parse(row["topology"]), row
                except InputError as error:
                    raise InputError(f"{path}, line {reader.line_num}: {error}") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a CSV file of text: {error}") from None
    if empty:
        raise InputError(f"{path} has no line of {' and '.join(columns)}; add some below its first line")


def _number(text: str | None) -> float:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise InputError(f"accuracy must be a number, got {text!r}; put a topology with commas in quotes") from None
    return value if math.isfinite(value) else math.nan
