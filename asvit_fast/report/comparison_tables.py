"""Several searches or growths in numbers: what each rule reaches, and how often searches agree."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..files import as_float
from ..runs import Run
from ..topology import SearchSpace, Topology
from .groups import Group, groups_of

Table = tuple[str, str, Sequence[str], Sequence[Sequence[Any]]]  # title, note, header, rows
PAPER_TABLE_3 = {  # mean and standard deviation / mean of ten searches
    "K1": (7.3, 0.1), "K2": (4.0, 0.0), "K3": (4.0, 0.0), "K4": (4.0, 0.0), "S1": (4.0, 0.6), "S2": (2.7, 0.5),
    "S3": (1.5, 0.3), "E1": (3.3, 0.4), "E2": (3.9, 0.4), "E3": (4.2, 0.3), "E4": (5.2, 0.2), "heads": (42.7, 0.5),
}  # fmt: skip
COLUMNS = (
    ("length_distortion", "length distortion", 1.0),
    ("ntk_condition", "NTK condition", 1.0),
    ("params", "parameters (M)", 1e6),
    ("flops", "MACs (M)", 1e6),
)


def reached_table(runs: Sequence[Run]) -> Table:
    """What the runs of each rule end with: mean and standard deviation over seeds."""
    rows = []
    for group in groups_of(runs):
        ends = [_end(run) for run in group.runs]
        cells = [_spread([as_float(end[name]) / unit for end in ends]) for name, _, unit in COLUMNS]
        steps = _spread([float(len(run.trace)) for run in group.runs])
        rows.append((group.label, group.seeds, steps, *cells))
    note = "Mean ± standard deviation over seeds of the result of each run."
    if len(starts := {run.config.get("topology") for run in runs}) > 1:
        note += f" The growths begin at {len(starts)} topologies."
    return "By rule", note, ("rule", "runs", "steps", *(title for _, title, _ in COLUMNS)), rows


def agreement_table(group: Group) -> Table:
    """How far searches by policy gradient agree on each dimension, beside the paper's ten (As-ViT, Table 3)."""
    found = [SearchSpace.choices_of(Topology.parse(run.topology)) for run in group.runs]
    rows = []
    for name in SearchSpace().dimensions:
        values = [choices[name] for choices in found]
        mean = statistics.fmean(values)
        deviation = statistics.stdev(values) / mean
        value, times = Counter(values).most_common(1)[0]
        paper = PAPER_TABLE_3[name]
        rows.append((name, f"{mean:.1f}", f"{deviation:.1f}", f"{value} in {times} of {len(values)}", *paper))
    header = ("dimension", "mean", "deviation / mean", "most frequent", "mean in the paper", "deviation / mean there")
    return f"Agreement of searches ({group.label}, {group.seeds})", "", header, rows


def _end(run: Run) -> dict[str, Any]:
    """The result of a run, or its last step, with measures."""
    if run.kind == "scale":
        last = run.trace[-1]
        return next(one for one in last["candidates"] if one["topology"] == last["topology"])
    return run.result or run.trace[-1]


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.4g}" if len(values) == 1 else f"{mean:.4g} ± {statistics.stdev(values):.2g}"
