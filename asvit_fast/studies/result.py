"""The result of a study."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..runs import read_run
from ..settings import check_seed
from .analysis import AGAINST, Analysis, Estimate, Noise, check_rows, kind_of


@dataclass(frozen=True)
class Study:
    """Topologies with what was measured of them untrained and the accuracy that they were trained to.

    ``rows``: one for each topology, as in trace.jsonl. Every property maps the name of a measure to an ``Estimate``
    (``.value``, and ``.low`` and ``.high`` of its 95 % bootstrap interval) or a number. Correlations above 0 mean that
    the measure orders networks as its authors say, of a measure of your own that larger is better; NaN stands for a
    measure, or an accuracy, that is the same for all networks. Fewer than 8 networks tell next to nothing: the interval
    is then from -1 to 1. Raises InputError for rows that lack something, or none.

    Examples:
        >>> import asvit_fast as af
        >>> measured = [{"params": 1e6, "flops": 2e9}, {"params": 2e6, "flops": 3e9}, {"params": 3e6, "flops": 1e9}]
        >>> rows = [{"measures": m, "top1": [top1]} for m, top1 in zip(measured, (60.0, 70.0, 80.0))]
        >>> af.Study(rows).kendall_tau["params"].value
        1.0
    """

    rows: list[dict[str, Any]]
    seed: int = 0

    def __post_init__(self) -> None:
        check_rows(self.rows)
        check_seed(self.seed)

    def __repr__(self) -> str:
        return f"Study({len(self.rows)} topologies, {len(self.rows[0]['measures'])} measures)"

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Study:
        """The study in a run directory, as far as it is done. Raises InputError where there is none."""
        run = read_run(Path(directory), ("study",))
        return cls(run.trace, run.config["seed"])

    @cached_property
    def analysis(self) -> Analysis:
        return Analysis(self.rows, self.seed)

    @property
    def kendall_tau(self) -> dict[str, Estimate]:
        """Kendall's tau-b between each measure and top-1 accuracy."""
        return self._each(self.analysis.kendall_tau)

    @property
    def spearman_rho(self) -> dict[str, Estimate]:
        """Spearman's rho between each measure and top-1 accuracy."""
        return self._each(self.analysis.spearman_rho)

    @property
    def tau_at_equal_params(self) -> dict[str, Estimate]:
        """Partial Kendall's tau at equal numbers of parameters."""
        return self._each(lambda name: self.analysis.partial_tau(name, "params"))

    @property
    def tau_at_equal_flops(self) -> dict[str, Estimate]:
        """Partial Kendall's tau at equal numbers of multiply-adds."""
        return self._each(lambda name: self.analysis.partial_tau(name, "flops"))

    @property
    def gain(self) -> dict[str, Estimate]:
        """Kendall's tau minus that of the paper's sum of ranks, of the same resamples."""
        return self._each(self.analysis.difference)

    @property
    def precision_at_top(self) -> dict[str, float]:
        """Share of the best tenth by each measure that is among the best tenth by accuracy; by chance, a tenth (of
        fewer than 15 networks the best tenth is one network, which is more)."""
        return self._each(self.analysis.precision_at_top)

    @property
    def regret(self) -> dict[str, float]:
        """How far the network with the best measure is behind the best network, in accuracy as ``rows`` have it. One
        that diverged counts with the lowest accuracy of the others."""
        return self._each(self.analysis.regret)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each measure takes for one network; measures of one pass have that pass's."""
        return self._each(self.analysis.seconds)

    @property
    def noise(self) -> Noise | None:
        """How much accuracies depend on the seed of training; None where too few networks have several."""
        return self.analysis.noise()

    @property
    def diverged(self) -> list[str]:
        """Topologies of which a training diverged; they rank last."""
        finite = np.isfinite(self.analysis.accuracy)
        return [str(row.get("topology")) for row, fine in zip(self.rows, finite, strict=True) if not fine]

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        accuracy = self.analysis.accuracy[np.isfinite(self.analysis.accuracy)]
        if not len(accuracy):  # all diverged
            accuracy = np.array([math.nan])
        noise = self.noise
        properties = ("kendall_tau", "spearman_rho", "tau_at_equal_params", "tau_at_equal_flops", "gain")
        estimates = {name: getattr(self, name) for name in properties}
        numbers = {name: getattr(self, name) for name in ("precision_at_top", "regret", "seconds")}
        return {
            "kind": "study",
            "topologies": len(self.rows),
            "diverged": self.diverged,
            "top1": {"lowest": float(accuracy.min()), "mean": float(accuracy.mean()), "highest": float(accuracy.max())},
            "noise": noise and {**asdict(noise), "ceiling": noise.ceiling},
            "chance_regret": self.analysis.chance_regret(),
            "compared_with": AGAINST,
            "measures": {
                name: {
                    **asdict(kind_of(name)),
                    **{key: asdict(values[name]) for key, values in estimates.items() if name in values},
                    **{key: values[name] for key, values in numbers.items()},
                }
                for name in self.analysis.names
            },
        }

    def _each(self, of: Callable[[str], Any]) -> dict[str, Any]:
        return {name: of(name) for name in self.analysis.names}
