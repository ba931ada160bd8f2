"""Random search, the baseline that costs as much as the search it is compared with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..run_directory import RunDirectory
from ..scoring.score import stream
from ..settings import SearchSettings
from ..topology import SearchSpace, Topology
from .budget import Budget
from .distributed import Share
from .evaluation import Evaluator, Measures, Task
from .progress import Progress
from .records import check_trace, with_floats
from .result import Baseline

_DRAWS = 2**31  # key of the stream that topologies are drawn from; those of the weights begin with a step


class RandomSearch:
    """``steps`` topologies drawn uniformly from those of ``space`` that fit the budget.

    That of step k is scored as the search scores its step k: same images, circles and seeds of the weights.
    """

    def __init__(self, space: SearchSpace, settings: SearchSettings, evaluator: Evaluator, budget: Budget) -> None:
        self.space, self.steps, self.width = space, settings.steps, settings.width
        self.evaluator, self.budget = evaluator, budget
        self.generator = stream(evaluator.seed, _DRAWS)
        self.config = {
            "kind": "baseline",
            "space": space.dimensions,
            "steps": self.steps,
            "budget": budget.to_dict(),
            "width": self.width,
            **evaluator.config,
        }

    def run(self, out: Path | None, share: Share[Task], progress: bool) -> Baseline:
        """All of it, or what is left of it in the run directory ``out``."""
        with RunDirectory(out, self.config, None, changeable=("steps",), rebuilds=True) as directory:
            done = len(directory.trace)
            if done > self.steps:
                raise directory.refuse_changes(f"{done} steps are on record: it can be made longer, not shorter")
            check_trace(directory, lambda step, *measured: self.record(step, self.draw(), *measured))
            if directory.changes:
                directory.accept_changes(directory.trace, {})
            with Progress("random baseline", self.steps, done, "steps", progress) as shown:
                for step in range(done, self.steps):
                    record = self.step(step, share)
                    directory.record(record, {})
                    shown.step(step + 1, _progress(record))
            baseline = Baseline([with_floats(record) for record in directory.trace])
            if directory.result is None:
                best = baseline.best
                directory.finish({"kind": "baseline", "steps": self.steps, "best": best and best.to_dict()})
            return baseline

    def step(self, step: int, share: Share[Task]) -> dict[str, Any]:
        """Draw and score; the trace record."""
        start = time.perf_counter()
        topology = self.draw()
        measures = self.evaluator.measure(share, [topology], step)[0]
        return self.record(step, topology, measures, time.perf_counter() - start)

    def record(self, step: int, topology: Topology, measures: Measures, seconds: float) -> dict[str, Any]:
        cost = self.evaluator.cost(topology)
        return {
            "step": step,
            "topology": str(topology),
            **measures._asdict(),
            "params": cost.params,
            "flops": cost.flops,
            "seconds": seconds,
        }

    def draw(self) -> Topology:
        """The next topology that fits the budget, which some do (``Budget.check_possible``)."""
        while True:
            topology = self.space.sample(self.generator, self.width)
            if self.budget.reject(self.evaluator.cost(topology)) is None:
                return topology


def _progress(record: dict[str, Any]) -> str:
    return (
        f"length {record['length_distortion']:.4g}, ntk {record['ntk_condition']:.4g}, {record['topology']}, "
        f"{record['seconds']:.2f} s"
    )
