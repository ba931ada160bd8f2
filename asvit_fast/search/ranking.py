"""Which topology is better: ranks in both measures, as in the scaling of As-ViT (arXiv 2202.11921, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .evaluation import Measures

LARGER_IS_BETTER = {"length_distortion": True, "ntk_condition": False}


def choose(measures: Sequence[Measures], convention: str = "paper") -> tuple[int | None, list[int | None]]:
    """Index of the winning candidate, and all sums of ranks; None stands for "not finite", which never wins."""
    finite = [index for index, values in enumerate(measures) if all(map(math.isfinite, values))]
    sums: list[int | None] = [None] * len(measures)
    for index in finite:
        sums[index] = 0
    for metric, larger in LARGER_IS_BETTER.items():
        order = sorted({getattr(measures[index], metric) for index in finite}, reverse=larger)
        dense_rank = {value: rank for rank, value in enumerate(order)}  # equal values share a rank
        for index in finite:
            sums[index] += dense_rank[getattr(measures[index], metric)]  # type: ignore[operator]
    if not finite:
        return None, sums
    ranking = sorted(finite, key=lambda index: sums[index])  # type: ignore[arg-type, return-value]  # stable
    tied = [index for index in ranking if sums[index] == sums[ranking[0]]]
    if len(tied) == 1:
        return tied[0], sums
    metric = max(("ntk_condition", "length_distortion"), key=lambda name: _spread(measures, finite, name))
    if convention == "reference":
        return min(tied[:2], key=lambda index: getattr(measures[index], metric)), sums
    sign = -1 if LARGER_IS_BETTER[metric] else 1
    return min(tied, key=lambda index: sign * getattr(measures[index], metric)), sums


def _spread(measures: Sequence[Measures], indices: Sequence[int], metric: str) -> float:
    """(max - min) / max over the candidates, the authors' "changing range"."""
    values = [getattr(measures[index], metric) for index in indices]
    difference = max(values) - min(values)
    if difference == 0:
        return 0.0
    return difference / max(values) if max(values) else math.inf
