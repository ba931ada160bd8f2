"""The plots of a run, as PNG bytes. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..files import as_float
from ..topology import Topology
from .runs import Run

BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#8A8A8A"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
DOTS_PER_INCH = 144


@dataclass(frozen=True)
class Point:
    """A scored candidate: where it lies, when it was scored, whether it was chosen."""

    length_distortion: float
    ntk_condition: float
    step: int
    chosen: bool = False

    @property
    def finite(self) -> bool:
        """Can it be drawn on axes that are linear in the one and logarithmic in the other?"""
        return math.isfinite(self.length_distortion) and math.isfinite(self.ntk_condition) and self.ntk_condition > 0


def progress(run: Run) -> bytes:
    """Entropy of the policy (nats) and reward over the steps of a search."""
    steps = np.array([record["step"] for record in run.trace])  # [steps]
    entropy = np.array([as_float(record["entropy"]) for record in run.trace])  # [steps], nats
    reward = np.array([as_float(record["reward"]) for record in run.trace])  # [steps]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.2))
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(steps, entropy, color=BLUE, linewidth=2)
        above.set(title="The policy makes up its mind", ylabel="entropy (nats)")
        below.axhline(0, color=GREY, linewidth=1)
        below.plot(steps, reward, "o", markersize=5, color=ORANGE, alpha=0.75, markeredgewidth=0, label="each step")
        window = max(1, min(20, len(steps) // 3))
        if window > 1:
            mean = np.convolve(reward, np.ones(window) / window, mode="valid")  # [steps - window + 1]
            below.plot(steps[window - 1 :], mean, color=VERMILLION, linewidth=2, label=f"mean of {window} steps")
        below.set(title="Reward of the sampled topology", xlabel="step", ylabel="reward (no unit)")
        below.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
        whole_steps(below)
        return png(figure)


def search_candidates(run: Run) -> bytes:
    """Length distortion against NTK condition number of every sampled topology; the result is marked."""
    points = [
        Point(as_float(record["length_distortion"]), as_float(record["ntk_condition"]), record["step"])
        for record in run.trace
    ]
    last = points[-1].step
    if run.result is not None:
        scores = as_float(run.result["length_distortion"]), as_float(run.result["ntk_condition"])
        points.append(Point(*scores, last, chosen=True))
    else:
        points += [
            Point(point.length_distortion, point.ntk_condition, last, chosen=True)
            for point, record in zip(points, run.trace, strict=True)
            if record["topology"] == run.topology
        ][-1:]
    return _scatter(points, "Every sampled topology", "the result" if run.finished else "the best so far")


def scale_candidates(run: Run) -> bytes:
    """Length distortion against NTK condition number of every candidate of every growth step; the chosen are marked."""
    points = [
        Point(
            as_float(candidate["length_distortion"]),
            as_float(candidate["ntk_condition"]),
            record["step"],
            chosen=candidate["topology"] == record["topology"],
        )
        for record in run.trace
        for candidate in record["candidates"]
    ]
    return _scatter(points, "Every candidate of every growth step", "chosen in its step")


def trajectory(run: Run) -> bytes:
    """Depth against width of the growing network, and its parameters over the steps."""
    path = [Topology.parse(topology) for topology in (run.config["topology"], *(r["topology"] for r in run.trace))]
    params = [as_float(record["params"]) / 1e6 for record in run.trace]  # millions
    candidates = {
        (topology.width, sum(topology.depths))
        for record in run.trace
        for topology in (Topology.parse(candidate["topology"]) for candidate in record["candidates"])
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5))
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        left.plot(*zip(*sorted(candidates), strict=True), "o", color=GREY, alpha=0.45, markersize=5, label="candidates")
        places = [(topology.width, sum(topology.depths)) for topology in path]
        left.plot(*zip(*places, strict=True), "o-", color=BLUE, linewidth=2, markersize=7, label="chosen")
        left.annotate("start", places[0], (8, -14), textcoords="offset points", fontsize=10)
        _label_steps(left, places[1:], params)
        left.set(title="Depth against width", xlabel="width of stage 1 (channels)", ylabel="depth (blocks in all)")
        left.yaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="upper left")
        left.margins(0.12)
        steps = [record["step"] for record in run.trace]
        right.plot(steps, params, "o-", color=VERMILLION, linewidth=2, markersize=7)
        right.set(title="Size", xlabel="step", ylabel="parameters (millions)", ylim=(0, None))
        whole_steps(right)
        return png(figure)


def _label_steps(axes: Axes, places: Sequence[tuple[int, int]], params: Sequence[float]) -> None:
    """Write the parameters beside the points: at most eight of them, always including the last."""
    every = math.ceil(len(places) / 8)
    for index in range(len(places) - 1, -1, -every):
        axes.annotate(f"{params[index]:.3g} M", places[index], (8, -14), textcoords="offset points", fontsize=10)


def _scatter(points: Sequence[Point], title: str, chosen_label: str) -> bytes:
    finite = [point for point in points if point.finite]
    steps = [point.step for point in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6))
        axes = figure.subplots()
        axes.set(title=title, xlabel="NTK condition number (no unit; left is better)")
        axes.set_ylabel("length distortion (no unit; up is better)")
        axes.set_xscale("log")
        axes.margins(0.08)
        drawn = axes.scatter(
            [point.ntk_condition for point in finite],
            [point.length_distortion for point in finite],
            c=[point.step for point in finite],
            vmin=min(steps),
            vmax=max(max(steps), min(steps) + 1),
            cmap="viridis",
            s=42,
            alpha=0.85,
            linewidths=0,
        )
        figure.colorbar(drawn, ax=axes, label="step", ticks=MaxNLocator(integer=True))
        _stars(axes, [point for point in finite if point.chosen], chosen_label)
        _non_finite(axes, [point for point in points if not point.finite])
        _ticks(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        return png(figure)


def _stars(axes: Axes, points: Sequence[Point], label: str) -> None:
    if not points:  # the chosen one has no finite score: a cross among the others
        return
    axes.scatter(
        [point.ntk_condition for point in points],
        [point.length_distortion for point in points],
        marker="*",
        s=520,
        facecolor="none",  # the dot inside keeps the colour of its step
        edgecolor=VERMILLION,
        linewidth=2.2,
        label=label,
        zorder=3,
    )


def _ticks(axes: Axes) -> None:
    """Plain numbers on the logarithmic axis, also when it spans less than a decade."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(8, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter("{x:.4g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _non_finite(axes: Axes, points: Sequence[Point]) -> None:
    """Candidates without a finite score: crosses on the right border, with their number in the legend."""
    if not points:
        return
    heights = [point.length_distortion for point in points]
    low, high = axes.get_ylim()
    axes.scatter(
        np.full(len(points), 0.985),  # fraction of the width: log axes have no place for infinity
        [(height - low) / (high - low) if math.isfinite(height) else 0.02 for height in heights],
        transform=axes.transAxes,
        marker="x",
        s=50,
        color=GREY,
        label=f"not finite: {len(points)}",
    )


def whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
