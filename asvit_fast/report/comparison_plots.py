"""Plots of several searches or several growths, by their rules, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import as_float
from ..runs import Run
from ..topology import Topology
from .groups import Group, groups_of
from .plots import BLUE, GREY, ORANGE, STYLE, VERMILLION, plain_ticks, png, whole_steps

RULE_COLOURS = {
    "scores": VERMILLION, "reinforce": VERMILLION, "random": GREY, "evolution": BLUE, "swin": BLUE, "vit": ORANGE,
    "resnet": "#009E73", "uniform": "#CC79A7",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # of the groups of a rule
SMOOTHED = 20  # steps of a moving mean


def growths(runs: Sequence[Run]) -> bytes:
    """Depth against width of every rule, random ones as a grey area, and both measures along the growth (As-ViT, Figure
    3)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2))
        left, right = figure.subplots(1, 2)
        for group in groups_of(runs):
            _paths(left, group, [[_place(run.config["topology"]), *map(_place, _texts(run))] for run in group.runs])
            _measures(right, group)
        left.set(title="What grows", xlabel="width of stage 1 (channels)", ylabel="depth (blocks in all)")
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="upper left", fontsize=10)
        right.set(title="Measures along the growth, first seed", ylabel="length distortion (up is better)")
        right.set_xlabel("NTK condition number (left is better)")
        right.set_xscale("log")
        right.set_yscale("log")
        plain_ticks(right.xaxis, *right.get_xlim())
        plain_ticks(right.yaxis, *right.get_ylim())
        return png(figure)


def _texts(run: Run) -> list[str]:
    return [record["topology"] for record in run.trace]


def _place(text: str) -> tuple[int, int]:
    topology = Topology.parse(text)
    return topology.width, sum(topology.depths)


def _style(group: Group) -> dict[str, Any]:
    return {"color": RULE_COLOURS.get(group.rule), "linestyle": LINES[group.number % len(LINES)]}


def _label(group: Group) -> str:
    return group.label if len(group.runs) == 1 else f"{group.label}, {group.seeds}"


def _paths(axes: Axes, group: Group, paths: list[list[tuple[int, int]]]) -> None:
    if group.rule == "random" and len(paths) > 1:
        widths: dict[int, list[int]] = {}
        for path in paths:
            for width, depth in path:
                widths.setdefault(depth, []).append(width)
        depths = sorted(widths)
        low, high = [min(widths[depth]) for depth in depths], [max(widths[depth]) for depth in depths]
        colour = RULE_COLOURS[group.rule]
        axes.fill_betweenx(depths, low, high, color=colour, alpha=0.3, linewidth=0, label=_label(group))
        return
    for number, path in enumerate(paths):
        label = None if number else _label(group)
        axes.plot(*zip(*path, strict=True), marker="o", alpha=0.8, label=label, markersize=4, **_style(group))


def _measures(axes: Axes, group: Group) -> None:
    """A line through what the first run chose, with the numbers of first and last step."""
    run = group.runs[0]
    chosen = [next(c for c in record["candidates"] if c["topology"] == record["topology"]) for record in run.trace]
    points = [(as_float(one["ntk_condition"]), as_float(one["length_distortion"])) for one in chosen]
    points = [point for point in points if np.isfinite(point).all()]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, alpha=0.8, **_style(group))
    for number in {0, len(points) - 1}:
        axes.annotate(str(number + 1), points[number], (4, 4), textcoords="offset points", fontsize=9)


def searches(runs: Sequence[Run]) -> bytes:
    """Both measures of what every search drew, moving means over steps (As-ViT, Figure 5)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8))
        panels = figure.subplots(1, 2)
        for group in groups_of(runs):
            for number, run in enumerate(group.runs):
                label = None if number else _label(group)
                for axes, name in zip(panels, ("length_distortion", "ntk_condition"), strict=True):
                    values = np.array([as_float(record[name]) for record in run.trace])  # [steps]
                    steps, mean = moving_mean(values)
                    axes.plot(steps, mean, alpha=0.7, linewidth=1.3, label=label, **_style(group))
        panels[0].set(
            title="Length distortion (up is better)", xlabel="step", ylabel=f"moving mean, {SMOOTHED} steps at most"
        )
        panels[1].set(title="NTK condition number (down is better)", xlabel="step")
        panels[0].legend(loc="best", fontsize=10)
        for axes in panels:
            whole_steps(axes)
        return png(figure)


def moving_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of steps, from 1, and the means of the last steps up to them; what is not finite is left out."""
    window = min(SMOOTHED, max(1, len(values) // 4))
    views = np.lib.stride_tricks.sliding_window_view(np.where(np.isfinite(values), values, np.nan), window)
    counts = np.isfinite(views).sum(1)  # [steps - window + 1]
    sums = np.nansum(views, 1)  # [steps - window + 1]
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.arange(window, len(values) + 1), mean
