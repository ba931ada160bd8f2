"""What a training ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .saving import ScheduleCost
from .schedule import RetokenizationSchedule


@dataclass(frozen=True)
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


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the best among those with the finest tokens so far: weights of a coarse phase do best on its grid,
    which nobody will use them on."""
    validated = [row for row in rows if row.get("top1") is not None]
    return max(validated, key=lambda row: (-row["token_reduction"], metric(row)), default=None)


def metric(row: Mapping[str, Any]) -> float:
    """What the best checkpoint is best in: top-1, of the average where there is one and it is better."""
    return max(row["top1"], row.get("ema_top1") or 0.0)
