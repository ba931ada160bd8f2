"""Topologies of a study that somebody else chose, and accuracies of networks that were trained elsewhere: CSV files."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import file_errors
from ..topology import Topology

Candidates = str | os.PathLike[str] | Sequence[str | Topology]  # a file, or the topologies themselves
Accuracies = str | os.PathLike[str] | Mapping[Any, Any]  # a file, or {topology: accuracy, or several of them}
SEPARATORS = ",;\t"


def read_topologies(source: Candidates, width: int) -> list[Topology]:
    """The different topologies in the column ``topology`` of a file, such as a search's top.csv, in their order.

    One that has no width gets ``width``. Raises InputError as ``read_accuracies`` does.
    """
    if isinstance(source, (str, os.PathLike)):
        return list(dict.fromkeys(topology for topology, _, _ in _lines(Path(source), ("topology",), width)))
    if not isinstance(source, Iterable):
        raise InputError(f"candidates must be a CSV file or a list of topologies, got {type(source).__name__}")
    found = list(dict.fromkeys(Topology.parse(topology, width) for topology in source))
    if not found:
        raise InputError("candidates must be one topology or more, got none")
    return found


def read_accuracies(source: Accuracies, width: int) -> dict[Topology, list[float]]:
    """Accuracies (larger is better) of each topology, in the order of the file; a topology may have several lines.

    The file has a header with ``topology`` and ``accuracy``; other columns are left alone. Commas, semicolons or tabs
    separate the columns. A topology that has no width gets ``width``. An empty accuracy, nan or inf stands for a
    training that diverged.

    Raises:
        InputError: a file that cannot be read, has no such columns, or a line that cannot be understood, naming it.
    """
    found: dict[Topology, list[float]] = {}
    if isinstance(source, (str, os.PathLike)):
        for topology, row, line in _lines(Path(source), ("topology", "accuracy"), width):
            found.setdefault(topology, []).append(_number(row["accuracy"], line))
    elif isinstance(source, Mapping) or hasattr(source, "items"):  # or a pandas Series
        for topology, values in source.items():
            several = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
            numbers = [_number(value, f"accuracies of {topology}") for value in several or [None]]
            found.setdefault(Topology.parse(topology, width), []).extend(numbers)
        if not found:
            raise InputError("accuracies must have one topology or more, got none")
    else:
        raise InputError(f"accuracies must be a CSV file or a dict, got {type(source).__name__}")
    return found


def _lines(path: Path, columns: tuple[str, ...], width: int) -> Iterator[tuple[Topology, dict[str, str], str]]:
    """The topology and all columns of every line, one at least, and where it is."""
    empty = True
    with file_errors("read", path), open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header = file.readline()
            separator = next((one for one in SEPARATORS if one in header), ",")
            reader = csv.DictReader(file, _cells(header, separator), delimiter=separator, skipinitialspace=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}; its first line must name {','.join(columns)}"
                )
            for row in reader:
                empty = False
                line = f"{path}, line {reader.line_num + 1}"
                if None in row:
                    advice = (
                        "put what has commas in quotes, and write 70.5 for 70,5" if separator == "," else "correct it"
                    )
                    raise InputError(f"{line} has more cells than the first line has names; {advice}")
                try:
                    topology = Topology.parse(row["topology"] or "", width)
                except InputError as error:
                    raise InputError(f"{line}: {error}") from None
                yield topology, row, line
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a CSV file of text: {error}") from None
    if empty:
        raise InputError(f"{path} has no line of {' and '.join(columns)}; add some below its first line")


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])


def _number(text: Any, where: str) -> float:
    try:
        value = math.nan if text in ("", None) else float(text)
    except (TypeError, ValueError):
        raise InputError(f"{where}: accuracy must be a plain number such as 70.5, got {text!r}") from None
    return value if math.isfinite(value) else math.nan
