"""Growing a topology in depth and width without training (As-ViT, arXiv 2202.11921, Algorithm 2)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError
from ..run_directory import RESULT, RunDirectory
from ..settings import ImageSize, ScaleSettings, ScoreSettings
from ..topology import Topology
from .budget import Budget
from .distributed import Share, run_shared
from .evaluation import METRICS, Evaluator, Images, Measures, Scorer, Task
from .growth_rules import GROWTH_RULES
from .progress import Progress
from .ranking import choose
from .records import difference, measures_of, seconds_of

WIDTH_GROWTH = (0.05, 0.1, 0.15, 0.2)
REFERENCE_SHRINK = 4  # the authors' code scores networks of a quarter of the width

Known = dict[str, Measures]  # of candidates that have been scored, by their text


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
        return {**vars(self), "topology": str(self.topology)}


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

    def to_dict(self) -> dict[str, Any]:
        """The record of trace.jsonl."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        return {**vars(self), "candidates": candidates, "topology": str(self.topology)}

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.topology == self.topology)


def scale(
    topology: Topology | str,
    max_params: float | tuple[float, float] = ScaleSettings.max_params,
    images: Images = None,
    seed: int = 0,
    convention: str = ScoreSettings.convention,
    scorer: Scorer | None = None,
    out: str | os.PathLike[str] | None = None,
    max_steps: int | None = None,
    img_size: ImageSize = ScoreSettings.img_size,
    repeats: int = ScoreSettings.repeats,
    thetas: int = ScoreSettings.thetas,
    batch: int = ScoreSettings.batch,
    norms: str = ScoreSettings.norms,
    device: str | torch.device | None = None,
    progress: bool = True,
    shrink: int | None = None,
    rule: str = ScaleSettings.rule,
) -> list[ScaleStep]:
    """Grow ``topology`` until it reaches a number of parameters; one entry a step, the last one holds the result.

    The candidates of a step have one more block in one of the stages and a width 5, 10, 15 or 20 % larger: 16 at most.
    They are ranked by length distortion (larger first) and by NTK condition number (smaller first), equal values
    sharing a rank; the smallest sum of ranks wins. Like ``search``, a run continues from ``out`` after a kill, is
    shared over the processes of torchrun, and is a pure function of its arguments. It may go on with a larger
    ``max_params`` or other ``max_steps``, as if it had been begun with them: from the first step on record where larger
    candidates fit now, with the scores of the others.

    Conventions. "paper": every width is the nearest integer above the old one; candidates are scored at their real
    width, as Algorithm 2 reads, so that the last steps towards 100 M score networks of that size (``shrink=4`` takes
    9 times fewer operations there); a tie goes to the better value of the measure that varies more. "reference", the
    authors' code: widths are those of the scored network, a quarter of the real one (8 for 32), rounded half to even,
    and may stay the same; a tie looks at two candidates only and goes to the SMALLER value, whichever the measure.

    Args:
        topology: where to start, with its depths and width.
        max_params: never exceeded; the run ends when no candidate fits. (The paper's loop ends beyond the limit.)
            A pair (stop at, never above), such as the authors' (80e6, 110e6), also ends the run at the first number.
            Parameters are counted with 1000 classes at ``img_size``: in the "paper" convention of the network that
            ``export`` writes, in the "reference" convention without position embedding.
        scorer: replaces the scores: candidate -> {"length_distortion": float, "ntk_condition": float}; the candidate
            has the scored width.
        max_steps: end after so many steps.
        rule: "scores" chooses as said above. Others are there for comparison: they take the same steps, choose without
            scores, and score what they chose: "random", and "swin", "vit", "resnet", "uniform", which keep to the depth
            and width of these families (``search/growth_rules.py``).
        shrink: real width / scored width; 1 for "paper" and 4 for "reference" by default.
        images, seed, out, img_size, repeats, thetas, batch, norms, device, progress: as in ``search``.

    Raises:
        InputError: an option that cannot be used, a limit that leaves no first step, a run directory that cannot be
            used; also when no candidate of a step has finite measures.

    Examples:
        >>> import asvit_fast as af
        >>> steps = af.scale("4,2,2|2,1,2|3,1,2|2,1,2|8,8", max_steps=1, img_size=32, repeats=1, batch=4)
        >>> sum(stage.depth for stage in steps[-1].topology.stages), steps[-1].topology.width > 8
        (5, True)
    """
    scoring = ScoreSettings(METRICS, img_size, thetas, repeats, batch, convention, norms, device)
    evaluator = Evaluator(scoring, images, seed, scorer)
    run = _Scaling(Topology.parse(topology), ScaleSettings(max_params, max_steps, shrink, rule), evaluator)

    def lead(share: Share[Task]) -> list[ScaleStep]:
        with RunDirectory(out, run.config, changeable=("max_params", "max_steps"), rebuilds=True) as directory:
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


class _Scaling:
    """A scaling run: the steps so far, and what is known of the next one's candidates."""

    def __init__(self, start: Topology, settings: ScaleSettings, evaluator: Evaluator) -> None:
        self.start, self.evaluator, self.convention = start, evaluator, evaluator.settings.convention
        self.cost = evaluator.cost
        self.limits, self.max_steps = _limits(settings.max_params), settings.max_steps
        self.budget = Budget(params=(None, self.limits[1]))
        self.shrink = settings.shrink or (REFERENCE_SHRINK if self.convention == "reference" else 1)
        if start.width % self.shrink:
            raise InputError(f"shrink must divide the width {start.width}, got {self.shrink}")
        self.rule = GROWTH_RULES.get(settings.rule)  # None: by scores
        self.steps: list[ScaleStep] = []
        self.known: Known = {}
        self.config = {
            "kind": "scale",
            "topology": str(start),
            "max_params": self.limits if self.limits[0] < self.limits[1] else self.limits[1],
            "max_steps": self.max_steps,
            "shrink": self.shrink,
            **({} if self.rule is None else {"rule": settings.rule}),  # as it was before there were rules
            **evaluator.config,
        }
        self.scored(start)  # raises when the heads do not fit the scored width
        self._check_limits()

    def run(self, directory: RunDirectory, share: Share[Task], progress: bool) -> list[ScaleStep]:
        """Take in the steps on record, and do the others."""
        self.replay(directory)
        millions = self.cost(self.reached).params / 1e6
        recorded = f"{len(self.steps)} steps" if self.steps else ""
        with Progress(
            "scale",
            self.limits[1] / 1e6,
            millions,
            "M parameters",
            progress,
            digits=2,
            out=directory.path,
            recorded=recorded,
        ) as shown:
            while not self.finished:
                step = self.step(directory, share, shown)
                self.steps.append(step)
                self.known = {}
                directory.record(step.to_dict(), self.state_dict())
                shown.step(step.params / 1e6, _progress(step))
        if directory.result is None:
            directory.finish(self.result())
        elif reason := difference(directory.result, self.result()):
            raise directory.damaged(RESULT, reason)
        return self.steps

    def replay(self, directory: RunDirectory) -> None:
        """Take in the steps on record that this run would have done, and what is known of the next one's candidates.

        With other limits than those on record, the run goes on from the first step that has other candidates now.
        """
        for number, record in enumerate(directory.trace):
            try:
                measures, seconds = _measured(record), seconds_of(record)
            except InputError as error:
                raise directory.damaged_line(number, str(error)) from None
            fitting = list(map(str, self.candidates()[0]))
            if self.finished or fitting != list(measures):
                if not directory.changes:
                    raise directory.damaged_line(number, "is no step that this run would have done")
                self._check_larger(directory, fitting, measures)
                self.known = measures
                break
            step = self.decide([measures[candidate] for candidate in fitting], seconds)
            if reason := difference(record, step.to_dict()):
                raise directory.damaged_line(number, reason)
            self.steps.append(step)
        else:
            self.known = self._scored(directory)
        if directory.changes:
            directory.accept_changes([step.to_dict() for step in self.steps], self.state_dict())
        elif directory.state is None and self.steps:
            directory.save(self.state_dict())

    def _check_larger(self, directory: RunDirectory, fitting: list[str], measures: Known) -> None:
        """Raise InputError when the next step has fewer candidates under the new limits than on record."""
        done = len(self.steps)
        if self.finished:
            change = f"the run would have ended after {done} steps"
        elif not set(fitting) >= set(measures):
            change = f"step {done} would have had {len(fitting)} instead of {len(measures)} candidates"
        else:
            return
        raise directory.refuse_changes(
            f"{change}, and {len(directory.trace)} are on record; give larger limits, or another run directory"
        )

    def _scored(self, directory: RunDirectory) -> Known:
        """Candidates of the step that an interrupted run was in."""
        if directory.state is None:
            return {}
        scored = directory.state.get("scored")
        if not isinstance(scored, dict) or not all(map(_is_pair, scored.values())):
            raise directory.damaged(str(directory.state_file), f"has no measures of candidates: {scored!r:.80}")
        return {str(candidate): Measures(*pair) for candidate, pair in scored.items()}

    @property
    def reached(self) -> Topology:
        """The topology so far."""
        return self.steps[-1].topology if self.steps else self.start

    @property
    def finished(self) -> bool:
        if not self.steps:
            return False
        at_limit = self.steps[-1].params >= self.limits[0] or len(self.steps) == self.max_steps
        return at_limit or not self.candidates()[0]

    def step(self, directory: RunDirectory, share: Share[Task], shown: Progress) -> ScaleStep:
        """Score the candidates (but those that are known) and choose one."""
        start, number = time.perf_counter(), len(self.steps)
        candidates, _ = self.candidates()
        left = [candidate for candidate in candidates if str(candidate) not in self.known]
        while left:
            chunk, left = left[: _chunk()], left[_chunk() :]
            measures = self.evaluator.measure(share, list(map(self.scored, chunk)), number)
            self.known = {**self.known, **dict(zip(map(str, chunk), measures, strict=True))}
            directory.save(self.state_dict())
            shown.within_step(f"step {number}, {len(candidates) - len(left)}/{len(candidates)} candidates")
        seconds = time.perf_counter() - start
        return self.decide([self.known[str(candidate)] for candidate in candidates], seconds)

    def scored(self, candidate: Topology) -> Topology:
        """The network that is scored in the place of a candidate."""
        return candidate.replace(width=candidate.width // self.shrink)

    def decide(self, measures: list[Measures], seconds: float) -> ScaleStep:
        """The next step, given the measures of its candidates."""
        candidates, dropped = self.candidates()
        winner, sums = choose(measures, self.convention)
        if self.rule is not None:  # it has chosen already
            winner = 0
        if winner is None:
            raise InputError(
                f"scale: none of the {len(candidates)} candidates of step {len(self.steps)} has finite measures; "
                "give other images, a larger img_size or a smaller batch"
            )
        rows = [
            Candidate(candidate, self.scored(candidate).width, cost.params, cost.flops, *values, rank_sum)
            for candidate, cost, values, rank_sum in zip(
                candidates, map(self.cost, candidates), measures, sums, strict=True
            )
        ]
        chosen = rows[winner]
        return ScaleStep(len(self.steps), rows, dropped, chosen.topology, chosen.params, chosen.flops, seconds)

    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        last, count = self.steps[-1], len(self.steps)
        sizes = {"params": last.params, "flops": last.flops, "steps": count}
        return {"kind": "scale", "start": str(self.start), "topology": str(last.topology), **sizes}

    def state_dict(self) -> dict[str, Any]:
        """The state that is saved beside the trace."""
        return {"scored": {candidate: list(values) for candidate, values in self.known.items()}}

    def candidates(self) -> tuple[list[Topology], list[dict[str, str]]]:
        """Those of the next step that are within the limit (of these, the one that the rule chooses, if it is not by
        scores), and the others with the reason."""
        fitting, dropped = [], []
        for candidate in grown(self.reached, self.convention, self.shrink):
            reason = self.budget.reject(self.cost(candidate))
            if reason is None:
                fitting.append(candidate)
            else:
                dropped.append({"topology": str(candidate), "reason": reason})
        if self.rule is not None and fitting:
            fitting = [self.rule(self.reached, fitting, self.evaluator.seed, len(self.steps))]
        return fitting, dropped

    def _check_limits(self) -> None:
        params = self.cost(self.start).params
        if params >= self.limits[0]:
            raise InputError(
                f"scale: {self.start} already has {params:,} parameters; raise max_params above that "
                f"(it is {self.limits[0]:,.0f})"
            )
        if not self.candidates()[0]:
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


def _measured(record: Mapping[str, Any]) -> Known:
    """Measures of the candidates of a record. Raises InputError when it has none."""
    candidates = record.get("candidates")
    if not isinstance(candidates, list) or any(
        not isinstance(candidate, dict) or not isinstance(candidate.get("topology"), str) for candidate in candidates
    ):
        raise InputError("has no candidates")
    return {candidate["topology"]: measures_of(candidate) for candidate in candidates}


def _is_pair(values: Any) -> bool:
    return isinstance(values, list) and [type(value) for value in values] == [float, float]


def _chunk() -> int:
    """Candidates between two saves: as many as there are processes, so that all have equally many repeats to do."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _progress(step: ScaleStep) -> str:
    chosen = step.chosen
    return (
        f"step {step.step}: {step.topology}, best of {len(step.candidates)}, length {chosen.length_distortion:.4g}, "
        f"ntk {chosen.ntk_condition:.4g}, {step.seconds:.2f} s"
    )
