"""Plots of the rows of ``asvit-fast bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from ..bench.rows import OUT_OF_MEMORY, BenchRow
from .plots import BLUE, GREY, ORANGE, STYLE, VERMILLION, png

GREEN, PURPLE, SKY, YELLOW = "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
COLOURS = {
    "source": GREY, "ours": VERMILLION, "ours-compiled": ORANGE, "compiled": BLUE, "sdpa": GREEN, "sdpa-compiled": SKY,
    "onnxruntime": PURPLE, "openvino": "#222222", "openvino-f32": YELLOW,
}  # fmt: skip

Value = Callable[[BenchRow], float | None]


def throughput(rows: Sequence[BenchRow], mode: str) -> bytes:
    """Images per second of every provider over the batch, a plot for each network, with quartiles."""
    return _grid(
        [row for row in rows if row.mode == mode], "images per second", lambda row: row.images_per_second, True
    )


def memory(rows: Sequence[BenchRow]) -> bytes:
    """Peak memory of every provider over the batch, a plot for each network and mode."""
    return _grid(rows, "peak memory of a call (MiB)", lambda row: row.peak_mebibytes, False)


def _grid(rows: Sequence[BenchRow], label: str, value: Value, quartiles: bool) -> bytes:
    panels = list(dict.fromkeys((row.network, row.mode, row.precision) for row in rows))
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * columns, 4.2 * lines))
        for axes, panel in zip(figure.subplots(lines, columns, squeeze=False).flat, panels, strict=False):
            _panel(axes, [r for r in rows if (r.network, r.mode, r.precision) == panel], label, value, quartiles)
            axes.set_title(f"{_short(panel[0])}, {panel[1]}, {panel[2]}", fontsize=11)
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        return png(figure)


def _short(network: str) -> str:
    return network if len(network) <= 30 else f"{network[:27]}..."


def _panel(axes: Axes, rows: Sequence[BenchRow], label: str, value: Value, quartiles: bool) -> None:
    providers = dict.fromkeys(row.provider for row in rows)
    batches = sorted({row.batch for row in rows})
    for provider in providers:
        own = sorted((r for r in rows if r.provider == provider and value(r) is not None), key=lambda row: row.batch)
        values = [value(row) or 0.0 for row in own]
        ended = any(row.provider == provider and row.status == OUT_OF_MEMORY for row in rows)
        if not own and not ended:
            continue  # nothing was measured of it
        name, style = f"{provider}, then out of memory" if ended else provider, COLOURS.get(provider)
        if len(batches) > 1:
            axes.plot([row.batch for row in own], values, "o-", color=style, label=name)
            if quartiles and own:
                low, high = zip(*(_quartiles(row) for row in own), strict=True)
                axes.fill_between([row.batch for row in own], low, high, color=style, alpha=0.2, linewidth=0)
        elif own:
            spread = [[values[0] - _quartiles(own[0])[0]], [_quartiles(own[0])[1] - values[0]]] if quartiles else None
            axes.bar([provider], values, yerr=spread, color=style, label=name, capsize=3)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    if len(batches) > 1:
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=9)
    else:
        axes.tick_params(axis="x", rotation=20)
    axes.set_xlabel("batch (images)" if len(batches) > 1 else f"batch {batches[0]}")


def _quartiles(row: BenchRow) -> tuple[float, float]:
    """Images per second of the slower and the faster quartile."""
    return 1e3 * row.batch / (row.upper_quartile or 1.0), 1e3 * row.batch / (row.lower_quartile or 1.0)
