"""The plots of a run, as PNG bytes. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from ..files import as_float
from ..runs import Run
from ..topology import Topology

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

    @classmethod
    def of(cls, record: dict[str, Any], step: int, chosen: bool = False) -> Point:
        """The point of a record with measures; steps count from 0 on record, from 1 here."""
        return cls(as_float(record["length_distortion"]), as_float(record["ntk_condition"]), step + 1, chosen)

    @property
    def finite(self) -> bool:
        """Whether it can be drawn on axes that are linear in the one and logarithmic in the other."""
        return math.isfinite(self.length_distortion) and math.isfinite(self.ntk_condition) and self.ntk_condition > 0


def progress(run: Run) -> bytes:
    """Both measures of the sampled topologies beside those of random ones, and the policy's entropy, over the steps."""
    with matplotlib.rc_context(STYLE):
        has_policy = "entropy" in run.trace[0]
        figure = Figure(figsize=(9, 9 if has_policy else 6.5))
        length, condition, *policy = figure.subplots(3 if has_policy else 2, 1, sharex=True)
        _measure(length, run, "length_distortion", np.asarray)
        length.set(title="Length distortion (up is better)")
        condition.set_yscale("log")
        _measure(condition, run, "ntk_condition", np.log)
        condition.set(title="NTK condition number (down is better)")
        plain_ticks(condition.yaxis, *condition.get_ylim())
        if has_policy:
            _entropy(policy[0], run)
        (policy[0] if has_policy else condition).set_xlabel("step")
        whole_steps(condition)
        figure.legend(*length.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=10)
        return png(figure)


def _entropy(axes: Axes, run: Run) -> None:
    entropy = [as_float(record["entropy"]) for record in run.trace]  # [steps], nats
    axes.plot(_done(run), entropy, color=BLUE, linewidth=2)
    axes.set(title="Entropy of the policy: it falls as the policy commits itself", ylabel="nats")


def _measure(axes: Axes, run: Run, name: str, to_scale: Callable[[np.ndarray], np.ndarray]) -> None:
    """Dots for the steps, their moving mean with its standard error, and mean and spread of the random baseline.

    ``to_scale`` is what the axis is linear in; the way back is its inverse.
    """
    to_axis: Callable[[Any], Any] = np.exp if to_scale is np.log else np.asarray
    values = _finite(run.trace, name)  # [steps], NaN where not finite
    steps = _done(run)
    axes.plot(steps, values, "o", markersize=4, color=ORANGE, alpha=0.6, markeredgewidth=0, label="each step")
    window = max(1, min(20, len(steps) // 3))
    if window > 1:
        views = np.lib.stride_tricks.sliding_window_view(to_scale(values), window)  # [steps - window + 1, window]
        counts = np.isfinite(views).sum(1)  # [steps - window + 1]
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a window without a finite value
            mean, error = np.nanmean(views, 1), np.nanstd(views, 1) / np.sqrt(counts)
        axes.plot(steps[window - 1 :], to_axis(mean), color=VERMILLION, linewidth=2, label=f"mean of {window} steps")
        axes.fill_between(
            steps[window - 1 :], to_axis(mean - error), to_axis(mean + error), color=VERMILLION, alpha=0.25, linewidth=0
        )
    random = to_scale(_finite(run.baseline, name))  # [topologies]
    random = random[np.isfinite(random)]
    if len(random):
        middle, spread = float(random.mean()), float(random.std())
        label = f"random: mean of {len(random)}, and their spread"
        axes.axhline(to_axis(middle), color=GREY, linewidth=2, linestyle="--", label=label)
        axes.axhspan(to_axis(middle - spread), to_axis(middle + spread), color=GREY, alpha=0.15, linewidth=0)


def _finite(records: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    values = np.array([as_float(record[name]) for record in records], dtype=float)  # [records]
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _done(run: Run) -> np.ndarray:
    """Steps done, from 1: where on the axis a step's numbers stand."""
    return np.arange(1, len(run.trace) + 1)  # [steps]


def search_candidates(run: Run) -> bytes:
    """Length distortion against NTK condition number of every sampled topology, with the random ones behind them; the
    result is marked."""
    points, random = ([Point.of(record, record["step"]) for record in records] for records in (run.trace, run.baseline))
    last = run.trace[-1]["step"]
    drawn = [record for record in run.trace if record["topology"] == run.topology]
    marked = drawn[-1:] if run.result is None else [run.result]
    points += [Point.of(record, last, chosen=True) for record in marked]
    name = "best" if "rule" in run.config else "most probable"
    label = f"the result: {name}" if run.finished else f"the {name} so far"
    return _scatter(points, "Every sampled topology", label, random)


def scale_candidates(run: Run) -> bytes:
    """Length distortion against NTK condition number of every candidate of every growth step; the chosen are marked."""
    points = [
        Point.of(candidate, record["step"], chosen=candidate["topology"] == record["topology"])
        for record in run.trace
        for candidate in record["candidates"]
    ]
    return _scatter(points, "Every candidate of every growth step", "chosen in its step")


def pareto(run: Run) -> bytes:
    """The sum of ranks in both measures against parameters, multiply-adds and, if measured, latency, with the front of
    those that no other topology beats in both."""
    records = list({record["topology"]: record for record in run.trace}.values())
    points = [Point.of(record, record["step"]) for record in records]
    records = [record for record, point in zip(records, points, strict=True) if point.finite]
    ranks = _rank_sums([point for point in points if point.finite])  # [topologies], 100 = best in both
    costs = [("params", "parameters (millions)", 1e6), ("flops", "multiply-adds (millions)", 1e6)]
    if records and "latency_ms" in records[0]:
        costs.append(("latency_ms", "latency (ms)", 1.0))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(costs), 4.6))
        panels = figure.subplots(1, len(costs), sharey=True)
        for axes, (name, label, unit) in zip(panels, costs, strict=True):
            values = np.array([as_float(record[name]) / unit for record in records])  # [topologies]
            axes.plot(values, ranks, "o", color=GREY, alpha=0.5, markersize=4, markeredgewidth=0)
            front = _front(values, ranks)
            axes.plot(values[front], ranks[front], "o-", color=VERMILLION, markersize=6, drawstyle="steps-post")
            axes.set_xlabel(label)
        panels[0].set(title="Scores against costs", ylabel="sum of ranks (% of the best possible)")
        return png(figure)


def _rank_sums(points: Sequence[Point]) -> np.ndarray:
    """Both ranks of each point, equal values sharing one, added: 100 is best in both, 0 worst."""
    columns = [[point.length_distortion for point in points], [-point.ntk_condition for point in points]]
    ranks = [np.unique(np.array(column), return_inverse=True)[1] for column in columns]  # [points] each
    return 50 * sum((rank / max(rank.max(initial=0), 1) for rank in ranks), np.zeros(len(points)))


def _front(costs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices of the points that no other has both cheaper and better, by cost."""
    front: list[int] = []
    for index in np.lexsort((-scores, costs)):
        if not front or scores[index] > scores[front[-1]]:
            front.append(int(index))
    return np.array(front, dtype=int)


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
        _label_ends(left, places, params)
        left.set(title="Depth against width", xlabel="width of stage 1 (channels)", ylabel="depth (blocks in all)")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        left.legend(loc="upper left")
        left.margins(0.12)
        right.plot(_done(run), params, "o-", color=VERMILLION, linewidth=2, markersize=7)
        right.set(title="Size", xlabel="step", ylabel="parameters (millions)", ylim=(0, None))
        whole_steps(right)
        return png(figure)


def _label_ends(axes: Axes, places: Sequence[tuple[int, int]], params: Sequence[float]) -> None:
    """Name the first and the last point, away from the line between them; the sizes of all stand in the plot beside."""
    axes.annotate("start", places[0], (10, -4), textcoords="offset points", fontsize=10, va="top")
    if len(places) > 1:
        end = f"{params[-1]:.3g} M parameters"
        axes.annotate(end, places[-1], (-10, 6), textcoords="offset points", fontsize=10, ha="right", va="bottom")


def _scatter(points: Sequence[Point], title: str, chosen_label: str, random: Sequence[Point] = ()) -> bytes:
    finite = [point for point in points if point.finite]
    steps = [point.step for point in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6))
        axes = figure.subplots()
        axes.set(title=title, xlabel="NTK condition number (no unit; left is better)")
        axes.set_ylabel("length distortion (no unit; up is better)")
        axes.set_xscale("log")
        axes.margins(0.08)
        if finite_random := [point for point in random if point.finite]:
            label = f"random baseline: {len(random)}"
            _dots(axes, finite_random, s=42, facecolor="none", edgecolor=GREY, label=label)
        drawn = _dots(
            axes,
            finite,
            c=[point.step for point in finite],
            vmin=min(steps),
            vmax=max(max(steps), min(steps) + 1),
            cmap="viridis",
            s=42,
            alpha=0.85,
            linewidths=0,
        )
        figure.colorbar(drawn, ax=axes, label="step", ticks=MaxNLocator(integer=True))
        if chosen := [point for point in finite if point.chosen]:  # else it has no finite score: a cross
            _dots(  # the dot inside the star keeps the colour of its step
                axes,
                chosen,
                marker="*",
                s=520,
                facecolor="none",
                edgecolor=VERMILLION,
                linewidth=2.2,
                label=chosen_label,
                zorder=3,
            )
        _non_finite(axes, [point for point in points if not point.finite])
        plain_ticks(axes.xaxis, *axes.get_xlim())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        return png(figure)


def _dots(axes: Axes, points: Sequence[Point], **style: Any) -> Any:
    conditions, lengths = [point.ntk_condition for point in points], [point.length_distortion for point in points]
    return axes.scatter(conditions, lengths, **style)


def plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, also when it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(8, steps=(1, 2, 5, 10)))
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(NullLocator())


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


def png(figure: Figure, photographs: bool = False) -> bytes:
    """The drawing as a file; in 96 colours, a third of the bytes, unless it has photographs in it."""
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    image = Image.open(drawn).convert("RGB")
    image = image if photographs else image.quantize(96, dither=Image.Dither.NONE)
    image.save(file, "png", optimize=True)
    return file.getvalue()
