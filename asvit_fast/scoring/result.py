"""Scores: measures of several networks."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..settings import ScoreSettings
from .measures import curvature, gauss_length, length_distortion

CURVE_METRICS = {"length_distortion": length_distortion, "curvature": curvature, "gauss_length": gauss_length}


@dataclass(frozen=True)
class Measure:
    """One metric over the repeats; ``seconds`` is the time of one repeat (metrics of the same pass share it).

    Non-finite values stay what they are: they are reported, and rank worst. ``percentile`` says how many percent of
    random topologies have a worse score at the same image size; None where no comparable ones are stored (they are
    those of Table 1 at 64 and 224 pixels, as the search scores them).
    """

    values: tuple[float, ...]
    seconds: float
    percentile: float | None = None

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for a single value, NaN when a value is not finite."""
        if len(self.values) == 1:
            return 0.0
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan


def percentile_text(metric: str, percentile: float | None, before: str = "") -> str:
    """Words such as "longer than 87 % of random topologies"; nothing where it is unknown."""
    if percentile is None:
        return ""
    better = {"length_distortion": "longer", "gauss_length": "longer"}.get(metric, "smaller")
    share = "more than 99" if percentile > 99 else "fewer than 1" if percentile < 1 else f"{percentile:.0f}"
    return f"{before}{better} than {share} % of random topologies"


@dataclass(frozen=True, repr=False)
class Score(Mapping[str, Measure]):
    """Metric name -> Measure, with what was scored and how; ``images`` names those of the NTK, None is noise."""

    target: str
    settings: ScoreSettings
    measures: dict[str, Measure]
    seed: int = 0
    images: str | None = None

    def __getitem__(self, metric: str) -> Measure:
        return self.measures[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    def __repr__(self) -> str:
        """The target and one metric a line."""
        width = max(map(len, self.measures))
        target = self.target if len(self.target) <= 60 else f"{self.target[:57]}..."
        lines = (
            f"  {name:{width}}  {m.mean:.5g} ± {m.std:.2g}{percentile_text(name, m.percentile, ', ')}"
            for name, m in self.measures.items()
        )
        return "\n".join([f"Score({target!r}, seed={self.seed})", *lines])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = "".join(
            f"<tr><th>{name}</th><td>{m.mean:.5g}</td><td>{m.std:.2g}</td><td>{m.seconds:.3g}</td></tr>"
            for name, m in self.measures.items()
        )
        head = "<tr><th>score</th><th>mean</th><th>std</th><th>seconds</th></tr>"
        return f"<table><caption>{html.escape(self.target)}, seed {self.seed}</caption>{head}{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; ``settings`` has all that makes the result."""
        settings = {**asdict(self.settings), "metrics": list(self.settings.metrics)}
        settings["device"] = None if self.settings.device is None else str(self.settings.device)
        settings |= {"seed": self.seed, "images": self.images}
        measures = {
            name: {
                "mean": m.mean,
                "std": m.std,
                "seconds": m.seconds,
                "values": list(m.values),
                "percentile": m.percentile,
            }
            for name, m in self.measures.items()
        }
        return {"target": self.target, "settings": settings, "metrics": measures}

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for every value: metric, repeat, value. Raises InputError without pandas."""
        try:
            import pandas
        except ImportError:
            raise InputError("a table of scores needs pandas: pip install pandas") from None
        rows = [(name, repeat, value) for name, m in self.measures.items() for repeat, value in enumerate(m.values)]
        return pandas.DataFrame(rows, columns=["metric", "repeat", "value"])
