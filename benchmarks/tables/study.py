"""Tables of studies: how well measures of untrained networks order trained ones."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

from .rows import RESULTS, markdown

LEFT_OUT = ("tokens of all blocks",)  # the same for all topologies


def study(task: str) -> str:
    """Every measure of a study, the best first."""
    result: dict[str, Any] = json.loads((RESULTS / "study" / task / "result.json").read_text())
    measures = [one for one in result["measures"].values() if one["title"] not in LEFT_OUT]
    lines = []
    for one in sorted(measures, key=lambda one: -one["kendall_tau"]["value"]):
        correlations = [_interval(one[key]) for key in ("kendall_tau", "tau_at_equal_params", "tau_at_equal_flops")]
        found = f"{100 * one['precision_at_top']:.0f} %"
        lines.append([one["title"], *correlations, found, f"{one['regret']:.1f}", f"{one['seconds']:.2f}"])
    lines.append(["a network drawn at random", "0", "0", "0", "10 %", f"{result['chance_regret']:.1f}", ""])
    header = ["measure", "tau", "at equal parameters", "at equal multiply-adds", "best tenth found", "points lost"]
    return markdown([*header, "seconds"], lines)


def _interval(estimate: dict[str, float]) -> str:
    if not isinstance(estimate["value"], float) or math.isnan(estimate["value"]):
        return ""
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"


TASKS = {f"study of {task}": functools.partial(study, task) for task in ("digits", "photographs", "photographs-longer")}
