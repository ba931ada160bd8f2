"""How well measures of untrained networks order trained ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import as_float
from .measures import KINDS, MeasureKind
from .ranks import Floats, kendall, partial, resamples, spearman, worst_last

RESAMPLES = 10_000
LEVEL = 95  # percent of resamples that an interval holds
TOP = 0.1  # part of the networks that counts as the best
FEWEST = 8  # networks, and
MOST_UNDEFINED = 0.05  # part of the resamples in which a measure orders nothing, for an interval that means anything
AGAINST = "combined_rank"  # what the search and scaling of the paper rank by; others are compared with it
PAPER = "sum of both ranks"
COMBINED: dict[str, tuple[MeasureKind, tuple[str, ...]]] = {  # measures made of ranks among all networks of a study
    "combined_rank": (MeasureKind(1, PAPER, "As-ViT, Algorithm 2"), ("length_distortion", "ntk_condition")),
    "combined_rank_reference": (
        MeasureKind(1, f"{PAPER}, authors' code", "As-ViT, Algorithm 2"),
        ("length_distortion_reference", "ntk_condition_reference"),
    ),
    "az_nas": (
        MeasureKind(1, "AZ-NAS", "arXiv 2403.19232"),
        ("az_expressivity", "az_progressivity", "az_trainability", "flops"),
    ),
}
ALL_KINDS: dict[str, MeasureKind] = {**KINDS, **{name: kind for name, (kind, _) in COMBINED.items()}}


def kind_of(name: str) -> MeasureKind:
    """What a measure is; one that nobody here knows is said to be better when larger."""
    return ALL_KINDS.get(name, MeasureKind(1, name, "given"))


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval, of bootstrap resamples of the networks.

    Of fewer than 8 networks, or where more than a twentieth of the resamples has no such number (a measure that is the
    same for all that were drawn), the interval is all that the number can be at all.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]" if math.isfinite(self.value) else "none"

    @classmethod
    def of(cls, values: Floats, networks: int, largest: float = 1.0) -> Estimate:
        """The first of the values [1 + B] is that of the networks themselves, the others are of resamples; all are
        from -largest to largest."""
        if not math.isfinite(values[0]):
            return cls(math.nan, math.nan, math.nan)
        usable = values[1:][np.isfinite(values[1:])]
        if networks < FEWEST or len(usable) < (1 - MOST_UNDEFINED) * (len(values) - 1):
            return cls(float(values[0]), -largest, largest)
        low, high = np.percentile(usable, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        return cls(float(values[0]), float(low), float(high))


class Analysis:
    """Correlations between measures and accuracies of ``rows``, in the order of trace.jsonl.

    Correlations have the direction in which a measure is said to be better: above 0 means that it is right. Networks
    whose training diverged and measures that are not finite rank last. ``seed`` draws the resamples, the same ones for
    all measures, so that differences between measures are paired. Raises InputError for no rows, or rows that lack
    something.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        check_rows(rows)
        self.rows = rows
        self.accuracy = np.array([accuracy_of(row) for row in rows])  # [n]; NaN: diverged
        self.weights = np.concatenate([np.ones((1, len(rows))), resamples(len(rows), RESAMPLES, seed)])  # [1 + B, n]
        self._target = worst_last(self.accuracy)
        given = rows[0]["measures"]
        present = [*(name for name in KINDS if name in given), *(name for name in given if name not in ALL_KINDS)]
        ranks = {name: worst_last(self.values(name), kind_of(name).direction) for name in present}
        for name, (_, parts) in COMBINED.items():
            if all(part in ranks for part in parts):
                ranks[name] = worst_last(_combine(name, [ranks[part] for part in parts]))
        self.ranks: dict[str, Floats] = ranks  # of each measure [n], 0 = worst

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.ranks)

    def values(self, name: str) -> Floats:
        """A measure of every network [n]; of a combination, its rank."""
        if name in COMBINED:
            return self.ranks[name]
        return np.array([as_float(row["measures"][name]) for row in self.rows])

    def seconds(self, name: str) -> float:
        """Mean time that a measure takes for one network."""
        parts = COMBINED[name][1] if name in COMBINED else (name,)
        times = [[as_float(row.get("seconds", {}).get(part, math.nan)) for row in self.rows] for part in parts]
        return float(np.mean(times, 1).sum())

    def kendall_tau(self, name: str) -> Estimate:
        return Estimate.of(self._tau(name, None), len(self.rows))

    def spearman_rho(self, name: str) -> Estimate:
        return Estimate.of(spearman(self.ranks[name], self._target, self.weights), len(self.rows))

    def partial_tau(self, name: str, fixed: str) -> Estimate:
        """Kendall's tau at equal ``fixed``, "params" or "flops"."""
        own, size, both = self._tau(name, None), self._tau(fixed, None), self._tau(name, fixed)
        return Estimate.of(partial(own, both, size), len(self.rows))

    def difference(self, name: str, other: str = AGAINST) -> Estimate:
        """How much larger Kendall's tau is than that of another measure."""
        return Estimate.of(self._tau(name, None) - self._tau(other, None), len(self.rows), largest=2.0)

    def precision_at_top(self, name: str) -> float:
        """Share of the best tenth by the measure that is in the best tenth by accuracy."""
        best = self.best_tenth
        return float(_chances(self.ranks[name], best) @ _chances(self._target, best) / best)

    @property
    def best_tenth(self) -> int:
        """How many networks are the best tenth: one at least."""
        return max(1, math.floor(TOP * len(self.rows) + 0.5))

    def regret(self, name: str) -> float:
        """How far the accuracy of the network with the best measure (the mean of such) is behind the best one."""
        chosen = self.ranks[name] == self.ranks[name].max()  # [n]
        return float(self._counted.max() - self._counted[chosen].mean())

    def chance_regret(self) -> float:
        """How far a network drawn at random is behind the best one."""
        return float(self._counted.max() - self._counted.mean())

    @functools.cached_property
    def _counted(self) -> Floats:
        """Accuracies [n] in which a network that diverged has the lowest one of the others; NaN where all have."""
        finite = self.accuracy[np.isfinite(self.accuracy)]
        return np.where(np.isfinite(self.accuracy), self.accuracy, finite.min() if len(finite) else math.nan)

    @functools.lru_cache(maxsize=256)  # noqa: B019  (as long as the analysis)
    def _tau(self, name: str, other: str | None) -> Floats:
        """Kendall's tau [1 + B] of a measure with accuracy, or with another measure; NaN where one was not taken."""
        own, with_which = self.ranks.get(name), self._target if other is None else self.ranks.get(other)
        if own is None or with_which is None:
            return np.full(len(self.weights), math.nan)
        return kendall(own, with_which, self.weights)

    def noise(self) -> Noise | None:
        """What the seeds of training do, of the networks that have several accuracies."""
        trainings = [row for row in map(finite, (row["top1"] for row in self.rows)) if row]
        repeated = [row for row in trainings if len(row) > 1]
        if len(repeated) < 2 or len(trainings) < 3:
            return None
        if all(row.get("train_seconds") for row in self.rows):  # ours: training k of each has the same seed
            most = max(map(len, repeated))
            repeated = [row for row in repeated if len(row) == most]
            within = _within_of_seeds(np.array(repeated)) if len(repeated) > 1 else math.nan
        else:
            deviations = [np.square(np.array(row) - np.mean(row)).sum() for row in repeated]
            within = float(sum(deviations) / sum(len(row) - 1 for row in repeated))
        total = float(np.var([np.mean(row) for row in trainings], ddof=1))
        luck = within * float(np.mean([1 / len(row) for row in trainings]))  # left in the means
        reliability = min(max(1 - luck / total, 0.0), 1.0) if total else 0.0
        return Noise(math.sqrt(within), math.sqrt(total), reliability, len(repeated))


@dataclass(frozen=True)
class Noise:
    """How much of the accuracies is luck.

    ``within``: standard deviation of the accuracy of a network over trainings, in its unit. Where the trainings are the
    study's own, beyond what a seed, which orders the images, does to all networks alike. ``total``: over networks, of
    the accuracies that are compared (the mean of a network's trainings), luck included; ``reliability``: the part of
    that variance that is the networks'; ``networks``: how many were trained several times, and tell it.
    """

    within: float
    total: float
    reliability: float
    networks: int

    @property
    def ceiling(self) -> float:
        """Kendall's tau of a perfect measure with the accuracies that are compared, if both are normally
        distributed."""
        return 2 / math.pi * math.asin(math.sqrt(self.reliability))


def _within_of_seeds(accuracies: Floats) -> float:
    """Variance of accuracies [networks, seeds] beyond the means of networks and of seeds."""
    networks, seeds = accuracies.shape
    residual = accuracies - accuracies.mean(0) - accuracies.mean(1, keepdims=True) + accuracies.mean()
    return float((residual**2).sum() / ((networks - 1) * (seeds - 1)))


def check_rows(rows: Any) -> None:
    """Raise InputError unless these are rows of a study, naming what is missing or no number."""
    if (
        isinstance(rows, (str, Mapping))
        or not isinstance(rows, Sequence)
        or not all(isinstance(r, Mapping) for r in rows)
    ):
        raise InputError(f"a study needs a list of rows as trace.jsonl has them, got {type(rows).__name__}")
    if not rows:
        raise InputError("a study needs the rows of one topology or more, got none")
    for number, row in enumerate(rows):
        missing = [name for name in ("measures", "top1") if not row.get(name)]
        missing += [
            f"measures[{name!r}]" for name in rows[0].get("measures", ()) if name not in row.get("measures", ())
        ]
        if missing:
            raise InputError(f"row {number} of the study lacks {', '.join(missing)}; give rows as trace.jsonl has them")
        try:
            for value in (*row["top1"], *row["measures"].values()):
                as_float(value)
        except (TypeError, ValueError, AttributeError):
            raise InputError(
                f"row {number} of the study: top1 must be a list of numbers and measures a dict of numbers, got "
                f"{row['top1']!r:.60} and {row['measures']!r:.60}"
            ) from None


def accuracy_of(row: Mapping[str, Any]) -> float:
    """Accuracy of a network: the mean over its trainings; NaN when one of them diverged."""
    values = [as_float(value) for value in row["top1"]]
    return sum(values) / len(values)


def finite(values: Sequence[Any]) -> list[float]:
    return [value for value in map(as_float, values) if math.isfinite(value)]


def _combine(name: str, ranks: Sequence[Floats]) -> Floats:
    """The sum of ranks [n]; in AZ-NAS of their logarithms, so that one bad rank counts much."""
    if name != "az_nas":
        return np.sum(ranks, 0)
    combine: Callable[[Floats], Floats] = np.log
    return np.sum([combine((rank + 1) / (rank.max() + 1)) for rank in ranks], 0)


def _chances(ranks: Floats, count: int) -> Floats:
    """The chance of every network [n] to be among the best ``count``, where equals are drawn from."""
    last = np.sort(ranks)[-count]
    above, equal = ranks > last, ranks == last
    return above + equal * ((count - above.sum()) / equal.sum())
