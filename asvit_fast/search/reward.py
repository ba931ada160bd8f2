"""The reward of the topology search: how much better than the previous candidate, relative to the range seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..settings import CONVENTIONS, SearchSettings, check_choice, check_integer

EPSILON = 1e-6  # the authors' code adds it to the range


class RewardHistory:
    """Measures of all candidates so far and the reward of the newest (As-ViT, Algorithm 1 and equation of r_t).

    reward_t = change(length distortion)_t - change(NTK condition)_t, change(x)_t = (x_t - x_{t-1}) / (max - min), with
    max and min over all values up to t (``convention="paper"``; 0 / 0 is 0), or over the last ``history`` values
    including x_t and with 1e-6 added to the range (``"reference"``). The first reward is 0.

    A measure that is not finite counts as the worst finite value of that measure seen so far, at every step anew, so it
    moves along when a worse one appears (what the authors' code intends for "bad architectures"). Hence it never earns
    more than any finite value seen so far would have earned, and no reward is ever infinite or NaN.
    """

    def __init__(self, convention: str = "reference", history: int = SearchSettings.history) -> None:
        check_choice("convention", convention, CONVENTIONS)
        check_integer("history", history, 2)  # a change needs two values
        self.convention = convention
        self.history = history
        self.length: list[float] = []
        self.ntk: list[float] = []

    def add(self, length: float, ntk: float) -> float:
        """Take in the length distortion and the NTK condition number of the next candidate; return its reward."""
        self.length.append(float(length))
        self.ntk.append(float(ntk))
        return self._change(self.length, worst=min) - self._change(self.ntk, worst=max)

    def _change(self, values: Sequence[float], worst: Any) -> float:
        finite = [value for value in values if math.isfinite(value)]
        if len(values) < 2 or not finite:
            return 0.0
        floor = worst(finite)
        seen = values if self.convention == "paper" else values[-self.history :]
        seen = [value if math.isfinite(value) else floor for value in seen]
        spread = max(seen) - min(seen)
        if self.convention == "reference":
            spread += EPSILON
        return (seen[-1] - seen[-2]) / spread if spread else 0.0


def reward_sequence(
    length: Sequence[float], ntk: Sequence[float], convention: str = "reference", history: int = SearchSettings.history
) -> list[float]:
    """Rewards of a sequence of candidates, given their length distortions and NTK condition numbers.

    ``history`` (number of values) only acts in the "reference" convention. See ``RewardHistory`` for the formula and
    for what becomes of values that are not finite. Raises InputError when the sequences differ in length.
    """
    if len(length) != len(ntk):
        raise InputError(f"rewards: {len(length)} length distortions but {len(ntk)} NTK condition numbers")
    rewards = RewardHistory(convention, history)
    return [rewards.add(*pair) for pair in zip(length, ntk, strict=True)]
