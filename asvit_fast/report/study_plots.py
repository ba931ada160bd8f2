"""The plots of a study, as PNG bytes."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..runs import Run
from ..studies.analysis import Analysis, kind_of
from ..studies.measures import COST
from ..studies.words import FEWEST_REPEATED, Accuracies
from .plots import BLUE, GREY, ORANGE, STYLE, VERMILLION, png

COLUMNS = 4  # of the panels of the scatter plots
MOST_DECADES = 1.5  # a measure that spans more is drawn on a logarithmic axis


def scatter(run: Run) -> bytes:
    """Accuracy against every measure, with Kendall's tau in each panel (As-ViT, Figure 2)."""
    analysis = Analysis(run.trace, run.config["seed"])
    names = analysis.names
    lines = -(-len(names) // COLUMNS)
    with matplotlib.rc_context({**STYLE, "font.size": 9, "axes.titlesize": 9, "axes.titlepad": 6}):
        figure = Figure(figsize=(3 * COLUMNS, 2.5 * lines))
        panels = figure.subplots(lines, COLUMNS, squeeze=False, sharey=True)
        for axes, name in zip(panels.flat, names, strict=False):
            _panel(axes, analysis, name)
        for axes in panels.flat[len(names) :]:
            axes.remove()
        for row in panels:
            row[0].set_ylabel(Accuracies.of(run.config).title)
        return png(figure)


def _panel(axes: Axes, analysis: Analysis, name: str) -> None:
    values, accuracy = analysis.values(name), analysis.accuracy  # [n]
    shown = np.isfinite(values) & np.isfinite(accuracy)  # [n]
    colour = _colour(name)
    axes.plot(values[shown], accuracy[shown], "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0)
    positive = values[shown & (values > 0)]
    if len(positive) == shown.sum() > 0 and positive.max() / positive.min() > 10**MOST_DECADES:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3))
        if len(positive) and positive.max() >= 1e4:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tau = analysis.kendall_tau(name)
    label = f"τ = {tau.value:+.2f} [{tau.low:+.2f}, {tau.high:+.2f}]" if math.isfinite(tau.value) else "constant"
    kind = kind_of(name)
    better = " (smaller is better)" if kind.direction < 0 else ""
    axes.set_title(f"{kind.title.replace(', ', ',' + chr(10))}{better}\n{label}")
    diverged, other = int((~np.isfinite(accuracy)).sum()), int((np.isfinite(accuracy) & ~np.isfinite(values)).sum())
    left_out = [f"{diverged} diverged"] * (diverged > 0) + [f"{other} not finite"] * (other > 0)
    if left_out:
        axes.set_xlabel(", ".join(left_out), color=GREY, fontsize=8)


def taus(run: Run) -> bytes:
    """Kendall's tau of every measure with its interval, and the time that it takes (As-ViT, Table 2)."""
    analysis = Analysis(run.trace, run.config["seed"])
    estimates = {name: analysis.kendall_tau(name) for name in analysis.names}
    names = sorted((n for n in estimates if math.isfinite(estimates[n].value)), key=lambda n: estimates[n].value)
    places = np.arange(len(names))
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(11, 1.6 + 0.32 * len(names)))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
        values = np.array([estimates[name].value for name in names])  # [measures]
        spread = [
            [estimates[n].value - estimates[n].low for n in names],
            [estimates[n].high - estimates[n].value for n in names],
        ]
        colours = [_colour(name) for name in names]
        left.barh(places, values, xerr=np.abs(spread), color=colours, height=0.65, capsize=2, ecolor="#444444")
        left.axvline(0, color="#444444", linewidth=1)
        noise = analysis.noise()
        if noise is not None and noise.networks >= FEWEST_REPEATED:
            left.axvline(
                noise.ceiling,
                color=GREY,
                linestyle="--",
                linewidth=1.5,
                label="a perfect measure, given the noise of seeds",
            )
            left.legend(loc="lower right", fontsize=9)
        left.set_yticks(places, [kind_of(name).title for name in names])
        left.set(title=f"Kendall's tau with {Accuracies.of(run.config).name}", xlabel="tau and 95 % bootstrap interval")
        right.barh(places, [max(analysis.seconds(name), 1e-6) for name in names], color=colours, height=0.65)
        right.set_xscale("log")
        right.set(title="Time", xlabel="seconds a network")
        if not names:
            left.text(0.5, 0.5, "no order to compare", transform=left.transAxes, ha="center", color=GREY)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        return png(figure)


def _colour(name: str) -> str:
    kind = kind_of(name)
    if kind.source == COST:
        return GREY
    if kind.source.startswith("As-ViT"):
        return VERMILLION
    return ORANGE if kind.title.startswith("AZ-NAS") else BLUE
