"""What a training ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from .schedule import RetokenizationSchedule
from .schedule_cost import ScheduleCost


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What a training ended with. ``epochs`` has a row for each epoch, as in trace.jsonl."""

    model: nn.Module
    ema: nn.Module | None
    epochs: list[dict[str, Any]]
    schedule: RetokenizationSchedule
    cost: ScheduleCost
    directory: Path | None

    @property
    def top1(self) -> float | None:
        """Accuracy of the last validation, percent."""
        return next((row["top1"] for row in reversed(self.epochs) if row.get("top1") is not None), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best validation with the finest tokens, by the better of the network and its average."""
        return best_row(self.epochs)

    @property
    def seconds(self) -> float:
        """Time in training steps, without validation."""
        return sum(row["train_seconds"] for row in self.epochs)

    def __repr__(self) -> str:
        return f"TrainResult({', '.join(f'{name}={value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._facts().items()
        )
        return f"<table>{cells}</table>"

    def to_dict(self) -> dict[str, Any]:
        """All but the networks, of what JSON holds: a row for each epoch, the schedule and what it has saved."""
        return {
            "epochs": [dict(row) for row in self.epochs],
            "top1": self.top1,
            "best": self.best,
            "seconds": self.seconds,
            "schedule": str(self.schedule),
            "saving": self.cost.saving,
            "directory": None if self.directory is None else str(self.directory),
        }

    def _facts(self) -> dict[str, str]:
        facts = {"epochs": str(len(self.epochs)), "schedule": repr(str(self.schedule))}
        if self.epochs:
            facts["train_loss"] = f"{self.epochs[-1]['train_loss']:.4g}"
        if self.best is not None:
            facts["top1"] = f"{self.top1:.2f} %"
            facts["best"] = f"{metric(self.best):.2f} % after epoch {self.best['epoch']}"
        facts["seconds"] = f"{self.seconds:.1f}"
        return facts if self.directory is None else {**facts, "directory": repr(str(self.directory))}


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the best among those with the finest tokens so far: weights of a coarse phase do best on its grid,
    which nobody will use them on."""
    validated = [row for row in rows if row.get("top1") is not None]
    return max(validated, key=lambda row: (-row["token_reduction"], metric(row)), default=None)


def metric(row: Mapping[str, Any]) -> float:
    """What the best checkpoint is best in: top-1, of the average where there is one and it is better."""
    return max(row["top1"], row.get("ema_top1") or 0.0)
