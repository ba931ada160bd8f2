"""Regularised evolution, against which the policy gradient is compared at the same number of scored topologies.

Source: E. Real et al., Regularized evolution for image classifier architecture search (arXiv 1802.01548).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..topology import Topology
from .baseline import Draw, RandomSearch
from .evaluation import Measures
from .ranking import choose

POPULATION = 50  # the youngest topologies, of which parents are taken; as many random ones come first
TOURNAMENT = 10  # of which the best becomes a parent
MAX_MUTATIONS = 1000  # tries of a step to stay within the budget


class RuleSearch(RandomSearch):
    """A search without a policy: its answer is the best of all that it scored, by the sum of ranks. This one draws at
    random."""

    kind = name = "search"
    rule = "random"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.config = {**self.config, "rule": self.rule}
        self.notes = list(self.budget.check_possible(self.space, self.evaluator.cost, self.settings.width))
        if unused := self.settings.changed("lr", "momentum", "history"):
            self.notes.append(f"no effect with rule {self.rule}, which has no policy: {', '.join(unused)}")
        self.scored: list[tuple[Topology, Measures]] = []

    def record(self, step: int, draw: Draw, measures: Measures, seconds: float) -> dict[str, Any]:
        self.scored.append((draw.topology, measures))
        return {**super().record(step, draw, measures, seconds), "best": str(self._best_of(self.scored))}

    def answer(self, trace: list[dict[str, Any]]) -> Topology:
        return self._best_of(self.scored)

    @staticmethod
    def _best_of(scored: list[tuple[Topology, Measures]]) -> Topology:
        """The first where none has finite measures."""
        winner = choose([measures for _, measures in scored])[0]
        return scored[winner or 0][0]


class Evolution(RuleSearch):
    """Each step changes one dimension of a good topology among the latest; the oldest drop out."""

    rule = "evolution"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.settings.steps <= POPULATION:
            self.notes.append(
                f"evolution begins with {POPULATION} random topologies: in {self.settings.steps} steps it is random"
            )

    def draw(self) -> Draw:
        if len(self.scored) < POPULATION:
            return super().draw()
        population = self.scored[-POPULATION:]
        chosen = torch.randperm(POPULATION, generator=self.generator)[:TOURNAMENT]  # [TOURNAMENT]
        parent = self._best_of([population[index] for index in chosen.tolist()])
        for _ in range(MAX_MUTATIONS):
            child = self._mutated(parent)
            if self.fits(child):
                return Draw(child, [], [])
        return super().draw()

    def _mutated(self, parent: Topology) -> Topology:
        """The parent with another value of one dimension."""
        choices = self.space.choices_of(parent)
        open_dimensions = [name for name, values in self.space.dimensions.items() if len(values) > 1]
        name = open_dimensions[self._draw_index(len(open_dimensions))] if open_dimensions else None
        if name is not None:
            others = [value for value in self.space.dimensions[name] if value != choices[name]]
            choices = {**choices, name: others[self._draw_index(len(others))]}
        return self.space.topology_of(choices, self.settings.width)

    def _draw_index(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


RULES: Mapping[str, type[RuleSearch]] = {"random": RuleSearch, "evolution": Evolution}
