"""The plots of a training, as PNG bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import as_float
from ..run_directory import accuracy
from ..runs import Run
from .plots import BLUE, GREY, ORANGE, STYLE, VERMILLION, png, whole_steps
from .training_tables import Row, epoch_macs, macs_unit, measure, measure_name, phases, time_unit, train_seconds

LOSSES = (("train_loss", "training", BLUE), ("eval_loss", "validation", ORANGE))
CHARACTER = 0.075  # inches, of the font of the labels
ACCURACIES = {  # by kind of run
    "train": (("top1", "network", VERMILLION), ("ema_top1", "moving average", BLUE)),
    "detect": (
        ("ap", "boxes", VERMILLION),
        ("mask_ap", "masks", BLUE),
        ("ema_ap", "boxes, moving average", ORANGE),
        ("ema_mask_ap", "masks, moving average", GREY),
    ),
}


def epochs(run: Run) -> bytes:
    """Loss and accuracy over the epochs."""
    ends = [row["epoch"] + 1 for row in run.trace]  # an epoch's numbers stand at its end
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.2))
        above, below = figure.subplots(2, 1, sharex=True)
        _lines(above, run, ends, LOSSES)
        above.set(title="Loss", ylabel=_loss_axis(run))
        _lines(below, run, ends, ACCURACIES[run.kind])
        below.set(title=measure_name(run), xlabel="epochs", ylabel=f"{_short(run)} (%)")
        for axes in (above, below):
            _shade(axes, run, ends)
            _legend(axes)
        whole_steps(below)
        return png(figure)


def cost(run: Run) -> bytes:
    """Accuracy (or the loss, of a training that is not validated) over multiply-adds and over time."""
    validated = any(accuracy(row) is not None for row in run.trace)
    macs = _sums(run, lambda row: epoch_macs(run, row["token_reduction"]))
    unit_macs, prefix = macs_unit(macs[-1])
    divisor, unit = time_unit(sum(map(train_seconds, run.trace)))
    times = _sums(run, lambda row: train_seconds(row) / divisor)
    axis = f"{_short(run)} (%)" if validated else _loss_axis(run)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, ends in ((left, [value / unit_macs for value in macs]), (right, times)):
            _lines(axes, run, ends, ACCURACIES[run.kind] if validated else LOSSES)
            _shade(axes, run, ends)
        _legend(right)
        left.set(title="Over computation", xlabel=f"{prefix}multiply-adds", ylabel=axis)
        right.set(title="Over time", xlabel=f"{unit} in training steps")
        return png(figure)


def _loss_axis(run: Run) -> str:
    """A detector's loss is a sum of losses in different units."""
    return "sum of losses" if run.kind == "detect" else "loss (nats)"


def _short(run: Run) -> str:
    """What the curves show: of detectors, boxes and masks."""
    return "AP" if run.kind == "detect" else measure(run)


def _sums(run: Run, of: Callable[[Row], float]) -> list[float]:
    return list(itertools.accumulate(of(row) for row in run.trace))


def _lines(axes: Axes, run: Run, ends: Sequence[float], lines: Sequence[tuple[str, str, str]]) -> None:
    for name, label, colour in lines:
        rows = zip(ends, run.trace, strict=True)
        points = [(end, as_float(row[name])) for end, row in rows if row.get(name) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-", color=colour, linewidth=2, markersize=3, label=label, clip_on=False
            )


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)


def _shade(axes: Axes, run: Run, ends: Sequence[float]) -> None:
    """The phases, darker the fewer tokens they see, with their tokens along the bottom."""
    start, done = 0.0, 0
    cast(Figure, axes.figure).draw_without_rendering()  # only the layout knows how wide the axes will be
    inches = axes.get_window_extent().width / cast(Figure, axes.figure).dpi
    for phase in phases(run):
        done += len(phase.rows)
        end = ends[done - 1]
        axes.axvspan(start, end, color=GREY, alpha=0.09 * (phase.reduction.bit_length() - 1), linewidth=0)
        if (end - start) / ends[-1] * inches > CHARACTER * (len(phase.title) + 1):  # else no room for its name
            place = axes.get_xaxis_transform()
            axes.text((start + end) / 2, 0.03, phase.title, transform=place, ha="center", fontsize=9, color="#444444")
        if start:
            axes.axvline(start, color=GREY, linewidth=1)
        start = end
    axes.set_xlim(0, ends[-1])
