"""Random search, the baseline that costs as much as the search it is compared with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import write_atomic
from ..run_directory import RESULT, RunDirectory
from ..scoring.draws import stream
from ..settings import SearchSettings
from ..topology import SearchSpace, Topology
from .budget import Budget
from .distributed import Share
from .evaluation import Evaluator, Measures, Task
from .progress import Progress
from .records import check_trace, difference, measures_of, with_floats
from .result import TOP, Baseline, SearchResult, top_sampled, top_table

_DRAWS = 2**31  # key of the stream that topologies are drawn from; those of the weights begin with a step


class Draw(NamedTuple):
    """A topology within the budget, its action where a policy took it, and what was rejected before."""

    topology: Topology
    action: list[int]
    rejected: list[dict[str, str]]


class RandomSearch:
    """Topologies drawn uniformly from those of ``space`` that fit the budget, one scored a step.

    That of step k is scored as the search scores its step k: same images, circles and seeds of the weights.
    """

    kind, name = "baseline", "random baseline"
    recorded: tuple[str, ...] = ("width",)  # settings that the configuration has, besides the steps

    def __init__(self, space: SearchSpace, settings: SearchSettings, evaluator: Evaluator, budget: Budget) -> None:
        self.space, self.settings, self.evaluator, self.budget = space, settings, evaluator, budget
        self.generator = stream(evaluator.seed, _DRAWS)
        self.config = {
            "kind": self.kind,
            "space": space.dimensions,
            "steps": settings.steps,
            "budget": budget.to_dict(),
            **{name: getattr(settings, name) for name in self.recorded},
            **evaluator.config,
        }

    def run(self, out: Path | None, share: Share[Task], progress: bool) -> Baseline:
        """All of it, or what is left of it in the run directory ``out``."""
        with RunDirectory(out, self.config, None, changeable=("steps",), rebuilds=True) as directory:
            self.advance(directory, share, progress)
            baseline = Baseline([with_floats(record) for record in directory.trace])
            if directory.result is None:
                best = baseline.best
                result = {"kind": self.kind, "steps": self.settings.steps, "best": best and best.to_dict()}
                directory.finish(result)
            return baseline

    def advance(self, directory: RunDirectory, share: Share[Task], progress: bool) -> int:
        """Take in the steps on record, which must be those that this run would have done, and do the others; how many
        were on record."""
        done, steps = len(directory.trace), self.settings.steps
        if done > steps:
            raise directory.refuse_changes(f"{done} steps are on record: it can be made longer, not shorter")
        check_trace(directory, lambda step, *measured: self.record(step, self.draw(), *measured))
        self.check_state(directory)
        if directory.changes:
            directory.accept_changes(directory.trace, self.state_dict())
        elif directory.state is None and done:
            directory.save(self.state_dict())
        recorded = f"{done} steps" if done else ""
        with Progress(self.name, steps, done, "steps", progress, out=directory.path, recorded=recorded) as shown:
            for step in range(done, steps):
                start = time.perf_counter()
                draw = self.draw()
                measures = self.evaluator.measure(share, [draw.topology], step)[0]
                record = self.record(step, draw, measures, time.perf_counter() - start)
                directory.record(record, self.state_dict())
                shown.step(step + 1, self.describe(record))
        return done

    def find(self, directory: RunDirectory, share: Share[Task], progress: bool) -> SearchResult:
        """Do what is left of the search, and say what it found."""
        done = self.advance(directory, share, progress)
        stored = directory.result if done == self.settings.steps else None
        trace = [with_floats(record) for record in directory.trace]
        topology = self.answer(trace)
        if stored is None:  # scored as one more step would be
            measures = self.evaluator.measure(share, [topology], self.settings.steps)[0]
        else:
            try:
                measures = measures_of(stored)
            except (InputError, AttributeError) as error:
                raise directory.damaged(RESULT, str(error)) from None
        result = self.result(topology, measures, trace)
        if stored is None:
            directory.finish(result.to_dict())
        elif reason := difference(stored, result.to_dict()):
            raise directory.damaged(RESULT, reason)
        if directory.path is not None:
            write_atomic(directory.path / TOP, top_table(top_sampled(trace, self.settings.topk)))
        return result

    def answer(self, trace: list[dict[str, Any]]) -> Topology:
        """The topology that the search finds."""
        raise NotImplementedError

    def result(self, topology: Topology, measures: Measures, trace: list[dict[str, Any]]) -> SearchResult:
        """What the search found; a search without a policy has no entropy."""
        cost = self.evaluator.cost(topology)
        return SearchResult(topology, *measures, cost.params, cost.flops, self.settings.steps, None, trace, None)

    def draw(self) -> Draw:
        """The next topology that fits the budget, which some do (``Budget.check_possible``)."""
        while True:
            topology = self.space.sample(self.generator, self.settings.width)
            if self.fits(topology):
                return Draw(topology, [], [])

    def fits(self, topology: Topology) -> bool:
        """Whether it is within the budget."""
        return self.budget.reject(self.evaluator.cost(topology)) is None

    def record(self, step: int, draw: Draw, measures: Measures, seconds: float) -> dict[str, Any]:
        """The trace record of a step."""
        cost = self.evaluator.cost(draw.topology)
        return {
            "step": step,
            "topology": str(draw.topology),
            **measures._asdict(),
            "params": cost.params,
            "flops": cost.flops,
            **({} if cost.latency_ms is None else {"latency_ms": cost.latency_ms}),
            "seconds": seconds,
        }

    def describe(self, record: dict[str, Any]) -> str:
        """The text that progress shows for a step."""
        return (
            f"length {record['length_distortion']:.4g}, ntk {record['ntk_condition']:.4g}, {record['topology']}, "
            f"{record['seconds']:.2f} s"
        )

    def check_state(self, directory: RunDirectory) -> None:
        """Raise InputError when the state on record is not that after the steps on record."""

    def state_dict(self) -> dict[str, Any]:
        """The state that is saved beside the trace."""
        return {}
