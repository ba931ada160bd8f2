"""Runs that a report compares, in groups of one rule and equal options: what differs in a group is the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..files import to_json
from ..runs import Run, rule_of

APART = ("kind", "rule", "seed", "topology", "version", "changes")  # of a configuration, and nothing that splits a rule
LONGEST = 30  # characters of a value in a label


@dataclass(frozen=True)
class Group:
    """``label``: the rule, with the options in which the compared runs differ; ``number``: which of its rule's groups
    it is, from 0; ``runs``: each with a seed of its own, or another topology to begin at."""

    rule: str
    label: str
    number: int
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> str:
        """How many runs there are, by their seeds where each has its own."""
        count = len(self.runs)
        unit = "seed" if len({run.config.get("seed") for run in self.runs}) == count else "run"
        return f"{count} {unit}{'s' * (count > 1)}"


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, the paper's own rule first."""
    options = [_options(run) for run in runs]
    values: dict[str, set[str]] = {}
    for one in options:
        for name, value in one.items():
            values.setdefault(name, set()).add(value)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run, one in zip(runs, options, strict=True):
        different = ", ".join(f"{name} {_short(value)}" for name, value in one.items() if len(values[name]) > 1)
        groups.setdefault((rule_of(run), different), []).append(run)
    ordered = sorted(groups, key=lambda key: key[0] not in ("scores", "reinforce"))
    rules = [rule for rule, _ in ordered]
    return [
        Group(
            rule,
            f"{rule}, {different}" if different else rule,
            rules[:place].count(rule),
            tuple(groups[rule, different]),
        )
        for place, (rule, different) in enumerate(ordered)
    ]


def _options(run: Run) -> dict[str, str]:
    """Nested options under the names of their last parts, as text."""
    found: dict[str, Any] = {}
    for name, value in run.config.items():
        if name not in APART:
            found |= value if isinstance(value, dict) else {name: value}
    return {name: to_json(value) for name, value in found.items()}


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."
