"""A training in numbers: its phases, what they cost, and how good the network became."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..files import as_float
from ..run_directory import accuracy, best_row
from ..runs import Run

Row = dict[str, Any]
Table = tuple[str, str, Sequence[str], Sequence[Sequence[Any]]]  # title, note, header, rows


@dataclass(frozen=True)
class Phase:
    """Epochs in a row with the same tokens."""

    reduction: int
    rows: list[Row]

    @property
    def title(self) -> str:
        return "full tokens" if self.reduction == 1 else f"tokens / {self.reduction**2}"


def phases(run: Run) -> list[Phase]:
    groups = groupby(run.trace, key=lambda row: row["token_reduction"])
    return [Phase(reduction, list(rows)) for reduction, rows in groups]


def epoch_macs(run: Run, reduction: int) -> float:
    """Multiply-adds of the forward passes of an epoch."""
    return as_float(run.config["flops"][str(reduction)]) * run.config["train_images"]


def train_seconds(row: Row) -> float:
    return as_float(row["train_seconds"])


def time_unit(seconds: float) -> tuple[int, str]:
    """Seconds in the unit that suits a time, and its name."""
    return (3600, "hours") if seconds >= 3600 else (60, "minutes") if seconds >= 60 else (1, "seconds")


def macs_unit(macs: float) -> tuple[float, str]:
    """The unit that suits a number of multiply-adds, and its prefix in words."""
    units = ((1e18, "exa-"), (1e15, "peta-"), (1e12, "tera-"), (1e9, "giga-"), (1e6, "mega-"))
    return next(((factor, prefix) for factor, prefix in units if macs >= factor), (1.0, ""))


def _macs_text(macs: float) -> str:
    factor, prefix = macs_unit(macs)
    return f"{macs / factor:,.3g} {prefix}MACs"


def measure_name(run: Run) -> str:
    """What a validation measures, in words."""
    return "Average precision" if run.kind == "detect" else "Accuracy"


def measure(run: Run) -> str:
    """The same in short."""
    return "AP of boxes" if run.kind == "detect" else "top-1"


def training_result_table(run: Run) -> Table:
    """The state of the training, and its cost compared with full tokens throughout."""
    spent = sum(epoch_macs(run, row["token_reduction"]) for row in run.trace)
    saved = 1 - spent / (epoch_macs(run, 1) * len(run.trace))
    rows: list[Sequence[Any]] = [
        ("epochs", f"{len(run.trace)} of {run.config['epochs']}"),
        ("schedule (epochs:reduction of tokens per side)", run.config["schedule"]),
        ("training loss of the last epoch", f"{as_float(run.trace[-1]['train_loss']):.4g}"),
    ]
    best = best_row(run.trace)
    if best is not None:
        last = next(row for row in reversed(run.trace) if accuracy(row) is not None)
        rows.append((f"{measure(run)} of the last validation (%)", f"{accuracy(last):.2f}"))
        rows.append((f"best {measure(run)} (%)", f"{accuracy(best):.2f} after {best['epoch'] + 1} epochs"))
    divisor, unit = time_unit(sum(map(train_seconds, run.trace)))
    rows.append((f"time in training steps ({unit})", f"{sum(map(train_seconds, run.trace)) / divisor:,.2f}"))
    rows.append(("multiply-adds of the forward passes", _macs_text(spent)))
    rows.append(("saved of these by fewer tokens", f"{100 * saved:.1f} %"))
    note = f"{measure_name(run)} is that of the network or of its moving average, whichever is better."
    return ("Result" if run.finished else "Last epoch"), note, ("", "value"), rows


def phase_table(run: Run) -> Table:
    """Every phase: its epochs, tokens, multiply-adds and seconds."""
    full = epoch_macs(run, 1)
    rows: list[Sequence[Any]] = []
    for phase in phases(run):
        macs, seconds = epoch_macs(run, phase.reduction), sum(map(train_seconds, phase.rows))
        found = [accuracy(row) for row in phase.rows if accuracy(row) is not None]
        rows.append(
            (
                f"{phase.rows[0]['epoch'] + 1} to {phase.rows[-1]['epoch'] + 1}",
                phase.title,
                f"{macs / run.config['train_images'] / 1e9:,.3f}",
                f"{100 * macs / full:.1f} %",
                _macs_text(macs * len(phase.rows)),
                f"{seconds:,.1f}",
                f"{seconds / len(phase.rows):,.1f}",
                f"{found[-1]:.2f}" if found else "",
            )
        )
    note = (
        "Epochs count from 1; MACs are multiply-adds of one image in one forward pass, seconds those of training steps."
    )
    header = (
        "epochs",
        "tokens",
        "MACs (G)",
        "of full",
        "of all its epochs",
        "seconds",
        "seconds an epoch",
        f"{measure(run)} (%)",
    )
    return "Phases", note, header, rows
