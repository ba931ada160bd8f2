"""Accuracies of networks that were trained elsewhere: a CSV file of topology and accuracy."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from ..errors import InputError
from ..files import file_errors
from ..topology import Topology

COLUMNS = ("topology", "accuracy")


def read_accuracies(path: str | Path) -> dict[Topology, list[float]]:
    """Accuracies (larger is better) of each topology, in the order of the file; a topology may have several lines.

    The file has a header with ``topology`` and ``accuracy``; other columns are left alone. An empty accuracy, nan or
    inf stands for a training that diverged.

    Raises:
        InputError: a file that cannot be read, has no such columns, or a line that cannot be understood, naming it.
    """
    path = Path(path)
    found: dict[Topology, list[float]] = {}
    with file_errors("read", path), open(path, newline="", encoding="utf-8") as file:
        try:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}; its first line must name topology,accuracy"
                )
            for row in reader:
                try:
                    topology, accuracy = Topology.parse(row["topology"]), _number(row["accuracy"])
                except InputError as error:
                    raise InputError(f"{path}, line {reader.line_num}: {error}") from None
                found.setdefault(topology, []).append(accuracy)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a CSV file of text: {error}") from None
    if not found:
        raise InputError(f"{path} has no line of topology and accuracy; add some below its first line")
    return found


def _number(text: str | None) -> float:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise InputError(f"accuracy must be a number, got {text!r}; put a topology with commas in quotes") from None
    return value if math.isfinite(value) else math.nan
