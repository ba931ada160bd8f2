"""The result of a search: the policy's choice, the best of what it sampled, and the random baseline."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..topology import Topology
from .evaluation import METRICS, Measures
from .policy import Policy
from .ranking import choose, order
from .records import measures_of

TOP = "top.csv"  # of a run: its best sampled topologies


@dataclass(frozen=True)
class ScoredTopology:
    """A topology with its measures, its cost (``flops`` are multiply-adds of one image), and the steps that drew it.

    ``length_distortion``: larger is better; ``ntk_condition``: smaller is better. ``str`` gives the topology's text.
    """

    topology: Topology
    length_distortion: float
    ntk_condition: float
    params: int
    flops: int
    steps: tuple[int, ...] = ()

    def __str__(self) -> str:
        return str(self.topology)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, text and lists, for JSON."""
        return {**asdict(self), "topology": str(self.topology), "steps": list(self.steps)}


def best_sampled(trace: Iterable[Mapping[str, Any]]) -> ScoredTopology | None:
    """The best topology on record, see ``top_sampled``; None when no topology has finite measures."""
    return next(iter(top_sampled(trace, 1)), None)


def top_sampled(trace: Iterable[Mapping[str, Any]], count: int) -> list[ScoredTopology]:
    """The best ``count`` topologies on record, the best first, by the sum of their ranks in both measures, as scaling
    ranks (As-ViT, Algorithm 2).

    ``trace``: records of trace.jsonl, of a search or of its baseline. A topology that was drawn several times counts
    once, with the means of its measures. Ties go to the better value of the measure that varies more. Those without
    finite measures are left out. Raises InputError for measures that are not numbers.
    """
    drawn: dict[str, list[Mapping[str, Any]]] = {}
    for record in trace:
        drawn.setdefault(record["topology"], []).append(record)
    means = [_mean([measures_of(record) for record in records]) for records in drawn.values()]
    found = []
    for place in order(means)[:count]:
        text, records = list(drawn.items())[place]
        steps, cost = tuple(record["step"] for record in records), (records[0]["params"], records[0]["flops"])
        found.append(ScoredTopology(Topology.parse(text), *means[place], *cost, steps))
    return found


def top_table(top: Sequence[ScoredTopology]) -> str:
    """The best topologies as CSV: the content of top.csv."""
    text = io.StringIO()
    names = [one.name for one in fields(ScoredTopology) if one.name != "steps"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", *names])
    for place, one in enumerate(top, start=1):
        writer.writerow([place, *(getattr(one, name) for name in names)])
    return text.getvalue()


def _mean(measures: list[Measures]) -> Measures:
    return Measures(*(sum(column) / len(column) for column in zip(*measures, strict=True)))


@dataclass(frozen=True)
class Baseline:
    """Random search at the cost of the search it belongs to: as many topologies, drawn uniformly, scored alike.

    ``trace``: one record for each, as in baseline/trace.jsonl.
    """

    trace: list[dict[str, Any]] = field(repr=False)

    @property
    def best(self) -> ScoredTopology | None:
        """The best of them, see ``best_sampled``."""
        return best_sampled(self.trace)


@dataclass(frozen=True)
class SearchResult:
    """The topology that a search found and how.

    ``topology`` is the paper's answer, the most probable one of the final policy (that fits the budget); of a search by
    another rule, which has no policy and no entropy, the best that was sampled, scored anew.
    ``length_distortion`` and ``ntk_condition`` its measures, ``params`` and ``flops`` (multiply-adds) its cost,
    ``entropy`` the final policy's in nats, ``trace`` one record a step as in trace.jsonl, ``baseline`` the random
    search that was asked for, or None.
    """

    topology: Topology
    length_distortion: float
    ntk_condition: float
    params: int
    flops: int
    steps: int
    entropy: float | None
    trace: list[dict[str, Any]] = field(repr=False)
    policy: Policy | None = field(repr=False, compare=False)
    baseline: Baseline | None = field(repr=False, default=None)

    @property
    def most_probable(self) -> ScoredTopology:
        """The most probable topology of the final policy, as in the paper, scored after the last step."""
        drawn = tuple(record["step"] for record in self.trace if record["topology"] == str(self.topology))
        return ScoredTopology(self.topology, self.length_distortion, self.ntk_condition, self.params, self.flops, drawn)

    @property
    def best_sampled(self) -> ScoredTopology | None:
        """The best of all sampled topologies by the sum of ranks in both measures; None when none has finite ones.

        The best of many noisy scores is partly luck: score it anew before you rely on the numbers.
        """
        return best_sampled(self.trace)

    @property
    def best(self) -> ScoredTopology:
        """The better scored of ``most_probable`` and ``best_sampled``: the one that is better in both measures, else
        in the measure in which they differ more, relative to the larger value."""
        sampled, probable = self.best_sampled, self.most_probable
        if sampled is None or sampled.topology == probable.topology:  # scored anew, on other weights
            return probable
        pair = [probable, sampled]
        winner = choose([Measures(one.length_distortion, one.ntk_condition) for one in pair])[0]
        return probable if winner is None else pair[winner]

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        names = (*METRICS, "params", "flops", "steps", "entropy")
        sampled = self.best_sampled
        return {
            "kind": "search",
            "topology": str(self.topology),
            **{name: getattr(self, name) for name in names},
            "best_sampled": None if sampled is None else sampled.to_dict(),
        }
