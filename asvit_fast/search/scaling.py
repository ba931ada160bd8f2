"""Growing a topology in depth and width without training (As-ViT, arXiv 2202.11921, Algorithm 2)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..cost import Cost, topology_cost
from ..errors import InputError
from ..files import as_float
from ..run_directory import RunDirectory
from ..topology import Topology
from .distributed import Share, run_shared
from .evaluation import METRICS, Evaluator, Images, Measures, Scorer, Task

WIDTH_GROWTH = (0.05, 0.1, 0.15, 0.2)
REFERENCE_SHRINK = 4  # the authors' code scores networks of a quarter of the width
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} M parameters [{elapsed}{postfix}]"
LARGER_IS_BETTER = {"length_distortion": True, "ntk_condition": False}


@dataclass(frozen=True)
class Candidate:
    """A candidate of one step at its real width; it was scored at ``scored_width`` channels.

    ``rank_sum`` is None when a measure is not finite: such a candidate is never chosen.
    """

    topology: Topology
    scored_width: int
    params: int
    flops: int
    length_distortion: float
    ntk_condition: float
    rank_sum: int | None

    def to_dict(self) -> dict[str, Any]:
        return {**_shallow(self), "topology": str(self.topology)}


@dataclass(frozen=True)
class ScaleStep:
    """One step of a scaling run: the topology chosen, its cost (``flops`` are multiply-adds) and the candidates.

    ``dropped`` lists candidates above the limit, which were not scored, with the reason.
    """

    step: int
    candidates: list[Candidate] = field(repr=False)
    dropped: list[dict[str, str]] = field(repr=False)
    topology: Topology
    params: int
    flops: int
    seconds: float

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ScaleStep:
        """The step of a record of trace.jsonl."""
        candidates = []
        for candidate in record["candidates"]:
            values = {name: as_float(candidate[name]) for name in METRICS}
            candidates.append(Candidate(**{**candidate, **values, "topology": Topology.parse(candidate["topology"])}))
        return cls(**{**record, "candidates": candidates, "topology": Topology.parse(record["topology"])})

    def to_dict(self) -> dict[str, Any]:
        """The record of trace.jsonl."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        return {**_shallow(self), "candidates": candidates, "topology": str(self.topology)}

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.topology == self.topology)


def scale(
    topology: Topology | str,
    max_params: float | tuple[float, float] = 100e6,
    images: Images = None,
    seed: int = 0,
    convention: str = "paper",
    scorer: Scorer | None = None,
    out: str | os.PathLike[str] | None = None,
    max_steps: int | None = None,
    img_size: int | tuple[int, int] = 224,
    repeats: int = 5,
    thetas: int = 10,
    batch: int = 16,
    norms: str = "auto",
    device: str | torch.device | None = None,
    progress: bool = True,
    shrink: int | None = None,
) -> list[ScaleStep]:
    """Grow ``topology`` until it reaches a number of parameters; one entry a step, the last one holds the result.

    The candidates of a step have one more block in one of the stages and a width 5, 10, 15 or 20 % larger: 16 at most.
    They are ranked by length distortion (larger first) and by NTK condition number (smaller first), equal values
    sharing a rank; the smallest sum of ranks wins. Like ``search``, a run continues from ``out`` after a kill, is
    shared over the processes of torchrun, and is a pure function of its arguments.

    Conventions. "paper": every width is the nearest integer above the old one; candidates are scored at their real
    width, as Algorithm 2 reads, so that the last steps towards 100 M score networks of that size (``shrink=4`` takes
    9 times fewer operations there); a tie goes to the better value of the measure that varies more. "reference", the
    authors' code: widths are those of the scored network, a quarter of the real one (8 for 32), rounded half to even,
    and may stay the same; a tie looks at two candidates only and goes to the SMALLER value, whichever the measure.

    Args:
        topology: where to start, with its depths and width.
        max_params: never exceeded; the run ends when no candidate fits. (The paper's loop ends beyond the limit.)
            A pair (stop at, never above), such as the authors' (80e6, 110e6), also ends the run at the first number.
            Parameters are counted with 1000 classes and no position embedding.
        scorer: replaces the scores: candidate -> {"length_distortion": float, "ntk_condition": float}; the candidate
            has the scored width.
        max_steps: end after so many steps.
        shrink: real width / scored width; 1 for "paper" and 4 for "reference" by default.
        images, seed, out, img_size, repeats, thetas, batch, norms, device, progress: as in ``search``.

    Raises:
        InputError: an option that cannot be used, a limit that leaves no first step, a run directory that cannot be
            used; also when no candidate of a step has finite measures.
    """
    evaluator = Evaluator(
        scorer=scorer,
        images=images,
        seed=seed,
        convention=convention,
        img_size=img_size,
        repeats=repeats,
        thetas=thetas,
        batch=batch,
        norms=norms,
        device=device,
    )
    if shrink is None:
        shrink = REFERENCE_SHRINK if convention == "reference" else 1
    run = _Scaling(Topology.parse(topology), _limits(max_params), max_steps, shrink, convention, img_size, evaluator)

    def lead(share: Share[Task]) -> list[ScaleStep]:
        with RunDirectory(out, run.config) as directory:
            return run.run(directory, share, progress)

    return run_shared(lead, evaluator.work, evaluator.device)


def grown(topology: Topology, convention: str = "paper", shrink: int = 1) -> list[Topology]:
    """The candidates of one step at the real width: stages in the outer loop, widths ascending in the inner one."""
    scored = topology.width // shrink
    widths: list[int] = []
    for growth in WIDTH_GROWTH:
        width = round(scored * (1 + growth))
        if convention == "paper":
            width = max(width, scored + 1)  # Algorithm 2 knows no candidate of the same width
        if not widths or width != widths[-1]:
            widths.append(width)
    candidates = []
    for stage in range(len(topology.depths)):
        depths = [depth + (index == stage) for index, depth in enumerate(topology.depths)]
        candidates += [topology.replace(depths=depths, width=width * shrink) for width in widths]
    return candidates


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


class _Scaling:
    """The state of a scaling run: the topology reached."""

    def __init__(
        self,
        start: Topology,
        limits: tuple[float, float],
        max_steps: int | None,
        shrink: int,
        convention: str,
        img_size: int | tuple[int, int],
        evaluator: Evaluator,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise InputError(f"max_steps must be at least 1, or None, got {max_steps}")
        if isinstance(shrink, bool) or not isinstance(shrink, int) or shrink < 1 or start.width % shrink:
            raise InputError(f"shrink must be a positive integer that divides the width {start.width}, got {shrink!r}")
        self.start, self.limits, self.max_steps = start, limits, max_steps
        self.shrink, self.convention, self.img_size, self.evaluator = shrink, convention, img_size, evaluator
        self.config = {
            "kind": "scale",
            "topology": str(start),
            "max_params": limits,
            "max_steps": max_steps,
            "shrink": shrink,
            **evaluator.config,
        }
        start.replace(width=start.width // shrink)  # raises when the heads do not fit the scored width
        self._check_limits()

    def cost(self, topology: Topology) -> Cost:
        return topology_cost(topology, self.img_size)

    def run(self, directory: RunDirectory, share: Share[Task], progress: bool) -> list[ScaleStep]:
        steps = [ScaleStep.from_dict(record) for record in directory.trace]
        scored = _scored(directory.state)
        with tqdm(total=self.limits[1] / 1e6, desc="scale", bar_format=_BAR, disable=not progress) as bar:
            while not self.finished(steps):
                _show(bar, self.cost(self.reached(steps)).params, len(steps))
                step = self.step(steps, scored, directory, share, bar)
                scored = []
                steps.append(step)
                directory.record(step.to_dict(), {"scored": []})
            _show(bar, self.cost(self.reached(steps)).params, len(steps))
        if directory.result is None:
            directory.finish(self.result(steps))
        return steps

    def reached(self, steps: list[ScaleStep]) -> Topology:
        return steps[-1].topology if steps else self.start

    def finished(self, steps: list[ScaleStep]) -> bool:
        if not steps:
            return False
        at_limit = steps[-1].params >= self.limits[0] or len(steps) == self.max_steps
        return at_limit or not self._fitting(steps[-1].topology)[0]

    def step(
        self,
        steps: list[ScaleStep],
        scored: list[Measures],
        directory: RunDirectory,
        share: Share[Task],
        bar: tqdm,
    ) -> ScaleStep:
        """Score the candidates (but the first ``len(scored)``, which an interrupted run has done) and choose one."""
        start = time.perf_counter()
        candidates, dropped = self._fitting(self.reached(steps))
        networks = [candidate.replace(width=candidate.width // self.shrink) for candidate in candidates]
        measures = list(scored)
        while len(measures) < len(networks):
            chunk = networks[len(measures) : len(measures) + _chunk()]
            measures += self.evaluator.measure(share, chunk, len(steps))
            directory.save({"scored": [list(values) for values in measures]})
            bar.set_postfix_str(_progress(len(steps), candidates, measures))
        winner, sums = choose(measures, self.convention)
        if winner is None:
            raise InputError(
                f"scale: none of the {len(candidates)} candidates of step {len(steps)} has finite measures; "
                "give other images, a larger img_size or a smaller batch"
            )
        rows = [
            Candidate(candidate, network.width, cost.params, cost.flops, *values, rank_sum)
            for candidate, network, cost, values, rank_sum in zip(
                candidates, networks, map(self.cost, candidates), measures, sums, strict=True
            )
        ]
        chosen = rows[winner]
        seconds = time.perf_counter() - start
        return ScaleStep(len(steps), rows, dropped, chosen.topology, chosen.params, chosen.flops, seconds)

    def result(self, steps: list[ScaleStep]) -> dict[str, Any]:
        last = steps[-1]
        return {
            "kind": "scale",
            "start": str(self.start),
            "topology": str(last.topology),
            "params": last.params,
            "flops": last.flops,
            "steps": len(steps),
        }

    def _fitting(self, topology: Topology) -> tuple[list[Topology], list[dict[str, str]]]:
        fitting, dropped = [], []
        for candidate in grown(topology, self.convention, self.shrink):
            params = self.cost(candidate).params
            if params > self.limits[1]:
                reason = f"{params:,} parameters > {self.limits[1]:,.0f}"
                dropped.append({"topology": str(candidate), "reason": reason})
            else:
                fitting.append(candidate)
        return fitting, dropped

    def _check_limits(self) -> None:
        params = self.cost(self.start).params
        if params >= self.limits[0]:
            raise InputError(
                f"scale: {self.start} already has {params:,} parameters; raise max_params above that "
                f"(it is {self.limits[0]:,.0f})"
            )
        if not self._fitting(self.start)[0]:
            smallest = min(self.cost(candidate).params for candidate in grown(self.start, self.convention, self.shrink))
            raise InputError(
                f"scale: the smallest first step has {smallest:,} parameters, above max_params {self.limits[1]:,.0f}; "
                "raise it"
            )


def _limits(max_params: float | tuple[float, float]) -> tuple[float, float]:
    pair = tuple(max_params) if isinstance(max_params, (tuple, list)) else (max_params, max_params)
    if len(pair) != 2 or any(
        isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < n < math.inf for n in pair
    ):
        raise InputError(
            f"max_params must be a number of parameters or a pair (stop at, never above), got {max_params!r}"
        )
    if pair[0] > pair[1]:
        raise InputError(f"max_params: stop at {pair[0]:,.0f} is above never above {pair[1]:,.0f}; swap them")
    return pair


def _spread(measures: Sequence[Measures], indices: Sequence[int], metric: str) -> float:
    """(max - min) / max over the candidates, the authors' "changing range"."""
    values = [getattr(measures[index], metric) for index in indices]
    difference = max(values) - min(values)
    if difference == 0:
        return 0.0
    return difference / max(values) if max(values) else math.inf


def _scored(state: dict[str, Any] | None) -> list[Measures]:
    return [Measures(*values) for values in state["scored"]] if state else []


def _chunk() -> int:
    """Candidates between two saves: as many as there are processes, so that all have equally many repeats to do."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _show(bar: tqdm, params: int, step: int) -> None:
    bar.n = params / 1e6
    bar.set_postfix_str(f"step {step}")


def _progress(step: int, candidates: Sequence[Topology], measures: Sequence[Measures]) -> str:
    last = measures[-1]
    return (
        f"step {step}, candidate {len(measures)}/{len(candidates)} {candidates[len(measures) - 1]}, "
        f"length {last.length_distortion:.4g}, ntk {last.ntk_condition:.4g}"
    )


def _shallow(record: Any) -> dict[str, Any]:
    return dict(vars(record))
