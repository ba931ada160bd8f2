"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from ..run_directory import accuracy, best_row
from .schedule import RetokenizationSchedule
from .schedule_cost import ScheduleCost


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The result of a training. ``epochs`` has a row for each epoch, as in trace.jsonl.

    Examples:
        >>> import torch, asvit_fast as af
        >>> images = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 2)
        >>> result = af.train("4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8", (images, images), epochs=1, img_size=32,
        ...                   batch_size=8, workers=0, device="cpu", progress=False)
        >>> 0 <= result.top1 <= 100, len(result.epochs), result.cost.saving
        (True, 1, 0.0)
    """

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
            facts["best"] = f"{accuracy(self.best):.2f} % after epoch {self.best['epoch']}"
        facts["seconds"] = f"{self.seconds:.1f}"
        return facts if self.directory is None else {**facts, "directory": repr(str(self.directory))}
