"""The better topology: ranks in both measures, as in the scaling of As-ViT (arXiv 2202.11921, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .evaluation import METRICS, Measures

SIGNS = {"length_distortion": -1, "ntk_condition": 1}  # times the measure: smaller is better


def order(measures: Sequence[Measures]) -> list[int]:
    """Indices of the candidates with finite measures from the best to the worst, the first being that of ``choose``."""
    sums = choose(measures)[1]
    finite = [index for index, rank_sum in enumerate(sums) if rank_sum is not None]
    metric = _deciding_metric(measures, finite)
    return sorted(finite, key=lambda index: (sums[index], SIGNS[metric] * getattr(measures[index], metric)))


def choose(measures: Sequence[Measures], convention: str = "paper") -> tuple[int | None, list[int | None]]:
    """Index of the winning candidate, and all sums of ranks; None stands for "not finite", which never wins."""
    finite = [index for index, values in enumerate(measures) if all(map(math.isfinite, values))]
    sums: list[int | None] = [None] * len(measures)
    if not finite:
        return None, sums
    costs = np.array([measures[index] for index in finite]) * [SIGNS[metric] for metric in METRICS]  # [finite, 2]
    dense = [np.unique(column, return_inverse=True)[1] for column in costs.T]  # ranks [finite]; equal values share one
    rank_sums = np.sum(dense, 0).tolist()  # [finite]
    for index, rank_sum in zip(finite, rank_sums, strict=True):
        sums[index] = rank_sum
    tied = [index for index in finite if sums[index] == min(rank_sums)]
    if len(tied) == 1:
        return tied[0], sums
    metric = _deciding_metric(measures, finite)
    if convention == "reference":
        return min(tied[:2], key=lambda index: getattr(measures[index], metric)), sums
    return min(tied, key=lambda index: SIGNS[metric] * getattr(measures[index], metric)), sums


def _deciding_metric(measures: Sequence[Measures], finite: Sequence[int]) -> str:
    """The measure that varies more, which settles ties."""
    return max(("ntk_condition", "length_distortion"), key=lambda name: _spread(measures, finite, name))


def _spread(measures: Sequence[Measures], indices: Sequence[int], metric: str) -> float:
    """(max - min) / max over the candidates, the authors' "changing range"."""
    values = [getattr(measures[index], metric) for index in indices] or [0.0]
    difference = max(values) - min(values)
    if difference == 0:
        return 0.0
    return difference / max(values) if max(values) else math.inf
