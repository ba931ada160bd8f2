"""Rows of benchmarks/results, and what tables are written with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
ZEN3, ZEN4, ZEN5 = "zen3", "zen4", "zen5"  # folders there, by the processor that measured
PROCESSORS = {ZEN3: "Zen 3", ZEN4: "Zen 4", ZEN5: "Zen 5"}
OURS = "ours"
Row = dict[str, str]


def read(processor: str, name: str) -> list[Row]:
    """The rows of a file, of those with the same setting the last."""
    with open(RESULTS / processor / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    setting = (
        "case",
        "network",
        "provider",
        "mode",
        "dtype",
        "precision",
        "batch",
        "model",
        "schedule",
        "seed",
        "name",
        "windows",
        "min_size",
        "work",
        "detector",
    )
    return list({tuple(row.get(key) for key in setting): row for row in rows}.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def times(factor: float) -> str:
    """A speed; bold where we lose."""
    text = f"{factor:.1f} x" if factor >= 1.995 else f"{factor:.2f} x"
    return text if factor >= 0.995 else f"**{text}**"


def span(factors: Sequence[float]) -> str:
    if not factors:
        return ""
    low, high = times(min(factors)), times(max(factors))
    return low if low == high else f"{low} to {high}"


def milliseconds(row: Row) -> float:
    return float(row["milliseconds"])


def fastest(providers: dict[str, Row], compiled: bool) -> Row:
    peers = [row for name, row in providers.items() if OURS not in name and ("compiled" in name) is compiled]
    return min(peers, key=milliseconds)
