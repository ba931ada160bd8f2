"""Rows of benchmarks in a line for each case: ours, the best of the others, how many times faster ours is.

    python benchmarks/gpu_summary.py FILE.csv ...

Where rows have times of replayed graphs, both are shown: called / replayed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]
TIMES = ("milliseconds", "replay_milliseconds")
TITLE = ("network", "case", "mode", "batch")  # columns that tell cases apart, those that there are


def title(row: Row) -> str:
    return ", ".join(row[name] for name in TITLE if row.get(name))


def seconds(row: Row, column: str) -> float | None:
    """Milliseconds in a column; None where nothing was measured."""
    value = float(row.get(column) or "nan")
    return value if value > 0 else None


def line(rows: Sequence[Row]) -> str:
    """One case."""
    cells = []
    for column in TIMES:
        timed = [(time, row["provider"]) for row in rows if (time := seconds(row, column))]
        ours = min((pair for pair in timed if pair[1].startswith("ours")), default=None)
        others = min((pair for pair in timed if not pair[1].startswith("ours") and pair[1] != "copy"), default=None)
        if ours and others:
            cells.append(f"{ours[0]:9.4f} {others[0]:9.4f} {others[0] / ours[0]:5.2f}x {others[1][:26]:26}")
        elif ours:
            cells.append(f"{ours[0]:9.4f} {'':9} {'':6} {'alone':26}")
    failed = [f"{row['provider']} {row['status']}" for row in rows if row.get("status", "ok") != "ok"]
    return f"{title(rows[0])[:62]:62} {' | '.join(cells)} {'; '.join(failed)}".rstrip()


def main(paths: Sequence[str]) -> None:
    print(f"{'':62} {'ours ms':>9} {'others':>9} {'':6} {'the best of them':26} | the same replayed")
    for path in map(Path, paths):
        if not path.exists():
            print(f"{path.name}: nothing was measured")
            continue
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in dict.fromkeys(map(title, rows)):
            print(line([row for row in rows if title(row) == name]))


if __name__ == "__main__":
    main(sys.argv[1:])
