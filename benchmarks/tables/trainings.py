"""Tables of trainings: accuracy and time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev

from .rows import ZEN3, ZEN5, Row, markdown, read, times


def trainings() -> str:
    """Whole trainings: medians over seeds."""
    found: dict[str, list[Row]] = {}
    for row in read(ZEN5, "retokenization"):
        found.setdefault(row["schedule"], []).append(row)
    lines = []
    for schedule, rows in found.items():

        def middle(key: str, rows: list[Row] = rows) -> float:
            return median(float(row[key]) for row in rows)

        full = schedule == "1"
        lines.append([
            "full tokens" if full else schedule,
            rows[0]["phases"], f"{middle('top1'):.1f}", f"{middle('ema_top1'):.1f}",
            f"{middle('train_seconds'):.1f}",
            *(["-"] * 3 if full else [
                f"{100 * middle('time_saved'):.1f} %", f"{100 * middle('flops_saved'):.1f} %", f"{middle('ratio'):.2f}"
            ]),
        ])  # fmt: skip
    header = ["schedule", "phases, epochs:reduction", "top-1", "of the average", "seconds", "time saved", "FLOPs saved"]
    return markdown([*header, "time / FLOPs"], lines)


def detection() -> str:
    """Detectors: COCO's AP in percent, means and standard deviations over seeds."""
    header = [
        "detector",
        "short side in the test",
        "AP",
        "AP50",
        "AP75",
        "AP of masks",
        "parameters",
        "MACs",
        "seconds, least",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    all_rows = read(ZEN3, "detection")
    trained_at = min((row["min_size"] for row in all_rows), key=int)
    for row in all_rows:
        groups.setdefault((row["name"], row["windows"], row["min_size"]), []).append(row)
    lines = []
    for (name, windows, side), rows in groups.items():
        shown = name if side == trained_at else f"&nbsp; the same, {windows} windows"
        figures = [_mean_and_deviation(rows, key) for key in ("ap", "ap50", "ap75", "mask_ap")]
        cost = [f"{float(rows[0]['params']) / 1e6:.2f} M", f"{float(rows[0]['macs']) / 1e9:.2f} G"]
        seconds = min(float(row["train_seconds"]) for row in rows)
        lines.append([shown, side, *figures, *cost, f"{seconds:.0f}"])
    return markdown(header, lines)


def _mean_and_deviation(rows: Sequence[Row], key: str) -> str:
    values = [float(row[key]) for row in rows]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def detection_speed() -> str:
    """Detectors of the same weights, against torchvision's around timm's network."""
    header = ["work", "detector", "seconds", "speed", "peak memory"]
    rows = read(ZEN3, "detection_speed")
    return markdown(
        header,
        [
            [row["work"], row["detector"], f"{float(row['seconds']):.2f}", times(float(row["speed_up"])),
             f"{row['peak_mib']} MiB"]
            for row in rows
        ],
    )  # fmt: skip
