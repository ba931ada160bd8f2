"""Topology search without training (As-ViT, arXiv 2202.11921, Algorithm 1)."""

from __future__ import annotations

import itertools
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..latency import LATENCY, LatencyModel, latency_model
from ..processes import init_process_group, rank, run_on_rank0
from ..run_directory import BASELINE, RunDirectory
from ..settings import ImageSize, ScoreSettings, SearchSettings, check_kind
from ..topology import SearchSpace, Topology
from .baseline import Draw, RandomSearch
from .budget import Budget
from .distributed import Share, run_shared
from .evaluation import METRICS, Evaluator, Images, Measures, Scorer, Task
from .evolution import RULES
from .policy import Policy
from .result import SearchResult
from .reward import RewardHistory

MAX_REJECTED = 1000  # draws of one step outside the budget


def search(
    space: SearchSpace | None = None,
    steps: int = SearchSettings.steps,
    images: Images = None,
    seed: int = 0,
    budget: Budget | None = None,
    convention: str = ScoreSettings.convention,
    out: str | os.PathLike[str] | None = None,
    img_size: ImageSize = ScoreSettings.img_size,
    repeats: int = ScoreSettings.repeats,
    thetas: int = ScoreSettings.thetas,
    batch: int = ScoreSettings.batch,
    width: int = SearchSettings.width,
    norms: str = ScoreSettings.norms,
    device: str | torch.device | None = None,
    scorer: Scorer | None = None,
    progress: bool = True,
    history: int = SearchSettings.history,
    lr: float = SearchSettings.lr,
    momentum: float = SearchSettings.momentum,
    baseline: str | None = None,
    rule: str = SearchSettings.rule,
    topk: int = SearchSettings.topk,
    batch_size: int = SearchSettings.batch_size,
) -> SearchResult:
    """Find a topology whose untrained networks have a large length distortion and a small NTK condition number.

    Each step draws a topology from the policy, scores it, and follows the gradient of log p(topology) (reward -
    baseline); the reward is the change of both measures against the previous step, relative to the range seen. The
    result is the most probable topology of the final policy, as in the paper, with its scores; the best of the sampled
    ones (``result.best_sampled``) and the better scored of the two (``result.best``) are there as well. It is a pure
    function of the arguments: a run that was killed continues from ``out`` and ends as if it had not been, one that is
    called with more ``steps`` goes on as if it had been begun with them. Under torchrun the repeats are shared over all
    processes, with the same result (on GPUs scores are the same to rounding).

    Args:
        space: the choices; by default Table 1 of the paper, 4,556,250 topologies.
        steps: topologies to score. A run on record may go on with another number, not below the steps it has done.
        images: what the NTK looks at: a folder, a tensor [B, 3, H, W], or None for standard normal noise.
        seed: of policy, weights, circles and noise.
        budget: topologies outside are rejected before they are scored, logged with the reason, and another is drawn;
            after 1000 in one step the most probable one that fits is taken. The result fits too. What counts is the
            network with 1000 classes at ``img_size``, in the "paper" convention as ``export`` writes it, in the
            "reference" convention without position embedding. A budget that excludes nothing is warned of.
        convention: "paper", or "reference" for the numbers of the authors' code (scores and rewards).
        out: run directory (config.json, trace.jsonl, state.pt, result.json, and baseline/), made or continued; None
            keeps all in memory. The trace is the truth: a lost state or result is made again from it.
        img_size: pixels, int or (height, width). repeats: initialisations per topology. thetas: points on the circle.
        batch: images for the NTK. width: channels of the first stage. norms: of the network whose curve is measured.
        device: a GPU if there is one, by default.
        scorer: replaces the scores: topology -> {"length_distortion": float, "ntk_condition": float}.
        progress: on stderr, a bar on a terminal, one line a step elsewhere.
        history: values in the range of the "reference" reward. lr: Adam's rate. momentum: of the moving average that
            rewards are compared with.
        baseline: "random" also scores ``steps`` topologies drawn uniformly (within the budget), after the search and
            under the same settings, for ``result.baseline``; may be asked for later, too.
        rule: "reinforce", or for comparison "random" (the best of ``steps`` uniform draws) or "evolution" (regularised
            evolution, arXiv 1802.01548), which end with the best that they scored.
        batch_size: of the forward pass whose latency a budget of ``latency_ms`` means; measured once, in latency.json.
        topk: how many of the best sampled topologies top.csv lists.

    Raises:
        InputError: an option that cannot be used, a budget that no topology fits, a run directory that is read-only, in
            use, damaged or of other options - all before anything is scored; later, a full disk.

    Examples:
        >>> import asvit_fast as af
        >>> space = af.SearchSpace({**af.SearchSpace().dimensions, "heads": (16,)})
        >>> result = af.search(space, steps=2, img_size=32, repeats=1, batch=4, progress=False)
        >>> result.topology.heads, len(result.trace)
        (16, 2)
    """
    if baseline not in (None, "random"):
        raise InputError(f"baseline must be 'random' or None, got {baseline!r}")
    check_kind("space", space, SearchSpace | None, "a SearchSpace, or None for that of the paper")
    check_kind("budget", budget, Budget | None, "a Budget(params=..., flops=...), or None")
    settings = SearchSettings(steps, width, history, lr, momentum, rule, topk, batch_size)
    scoring = ScoreSettings(METRICS, img_size, thetas, repeats, batch, convention, norms, device)
    evaluator = Evaluator(scoring, images, seed, scorer)
    space, budget = space or SearchSpace(), budget or Budget()
    if budget.latency_ms is not None:
        evaluator.latency = _measured(space, width, scoring, batch_size, evaluator.device, out)
    run = RULES.get(rule, _Search)(space, settings, evaluator, budget)

    def lead(share: Share[Task]) -> SearchResult:
        for note in run.notes + _without_effect(settings, budget, baseline):
            warnings.warn(note, stacklevel=4)
        with RunDirectory(out, run.config, changeable=("steps",), rebuilds=True) as directory:
            compared = None
            result = run.find(directory, share, progress)
            if baseline == "random":
                compared = RandomSearch(run.space, settings, evaluator, run.budget).run(
                    None if directory.path is None else directory.path / BASELINE, share, progress
                )
            return replace(result, baseline=compared)

    return run_shared(lead, evaluator.work, evaluator.device)


def _without_effect(settings: SearchSettings, budget: Budget, baseline: str | None) -> list[str]:
    """Which options change nothing."""
    notes = []
    if budget.latency_ms is None and (unused := settings.changed("batch_size")):
        notes.append(f"no effect without latency_ms: {', '.join(unused)}")
    if settings.rule == "random" and baseline == "random":
        notes.append("no effect: baseline random, which draws the topologies that rule random does")
    return notes


def _measured(
    space: SearchSpace,
    width: int,
    scoring: ScoreSettings,
    batch_size: int,
    device: torch.device,
    out: str | os.PathLike[str] | None,
) -> LatencyModel:
    """Latencies on this machine, measured by one process for all, and how far they can be trusted."""
    path = None if out is None else Path(out) / LATENCY
    init_process_group(device)
    model = run_on_rank0(lambda: latency_model(space, width, scoring.img_size, batch_size, device, path))
    if rank() == 0:
        warnings.warn(
            f"latencies are sums over {len(model.pieces)} measured blocks; those of {len(model.checks)} whole networks "
            f"are missed by {100 * model.error:.0f} % on average ({100 * model.bias:+.0f} % with sign)",
            stacklevel=4,
        )
    return model


class _Search(RandomSearch):
    """Draws topologies from a policy, which learns from the rewards. What a step does depends on nothing else."""

    kind = name = "search"
    recorded = ("width", "history", "lr", "momentum")

    def __init__(self, space: SearchSpace, settings: SearchSettings, evaluator: Evaluator, budget: Budget) -> None:
        super().__init__(space, settings, evaluator, budget)
        self.generator = torch.Generator().manual_seed(evaluator.seed)
        self.policy = Policy(space, lr=settings.lr, momentum=settings.momentum, generator=self.generator)
        self.rewards = RewardHistory(evaluator.settings.convention, settings.history)
        self.notes = budget.check_possible(space, evaluator.cost, settings.width)

    def draw(self) -> Draw:
        """An action of the policy within the budget; after many that are not, the most probable one that is."""
        rejected: list[dict[str, str]] = []
        draws = (self.policy.sample(self.generator) for _ in range(MAX_REJECTED))
        for action in itertools.chain(draws, self.policy.ranked()):
            topology = self.space.topology(action, self.settings.width)
            reason = self.budget.reject(self.evaluator.cost(topology))
            if reason is None:
                return Draw(topology, action, rejected)
            if len(rejected) < MAX_REJECTED:
                rejected.append({"topology": str(topology), "reason": reason})
        raise AssertionError("a budget that some topology fits rejects all")  # check_possible has found one

    def record(self, step: int, draw: Draw, measures: Measures, seconds: float) -> dict[str, Any]:
        """Reward and update; the trace record."""
        reward = self.rewards.add(*measures)
        log_prob, entropy = self.policy.log_prob(draw.action), self.policy.entropy()
        self.policy.update(draw.action, reward)
        cost = self.evaluator.cost(draw.topology)
        return {
            "step": step,
            "topology": str(draw.topology),
            "action": draw.action,
            **measures._asdict(),
            "reward": reward,
            "baseline": self.policy.baseline,
            "log_prob": log_prob,
            "entropy": entropy,
            "most_probable": str(self.most_probable()),
            "params": cost.params,
            "flops": cost.flops,
            **({} if cost.latency_ms is None else {"latency_ms": cost.latency_ms}),
            "seconds": seconds,
            "rejected": draw.rejected,
        }

    def describe(self, record: dict[str, Any]) -> str:
        probable = Topology.parse(record["most_probable"]).seed_string
        return (
            f"length {record['length_distortion']:.4g}, ntk {record['ntk_condition']:.4g}, "
            f"reward {record['reward']:+.2f}, entropy {record['entropy']:.2f}, most probable {probable}, "
            f"{record['seconds']:.2f} s"
        )

    def most_probable(self) -> Topology:
        """The most probable topology that fits the budget."""
        topologies = (self.space.topology(action, self.settings.width) for action in self.policy.ranked())
        return next(filter(self.fits, topologies))

    def answer(self, trace: list[dict[str, Any]]) -> Topology:
        return self.most_probable()

    def result(self, topology: Topology, measures: Measures, trace: list[dict[str, Any]]) -> SearchResult:
        return replace(super().result(topology, measures, trace), entropy=self.policy.entropy(), policy=self.policy)

    def check_state(self, directory: RunDirectory) -> None:
        if directory.state is not None and not _same_logits(directory.state, self.policy):
            done = len(directory.trace)
            raise directory.damaged(str(directory.state_file), f"is not the state after the {done} steps on record")

    def state_dict(self) -> dict[str, Any]:
        """The policy now; whatever a search goes on from follows from its trace."""
        return {"policy": {"logits": self.policy.logits.detach().clone()}}


def _same_logits(state: dict[str, Any], policy: Policy) -> bool:
    stored = state.get("policy")
    logits = stored.get("logits") if isinstance(stored, dict) else None
    own = policy.logits.detach()  # [choices of all dimensions]
    if not isinstance(logits, Tensor) or logits.shape != own.shape or logits.dtype != own.dtype:
        return False
    return torch.allclose(logits, own, rtol=1e-6, atol=1e-9)  # another processor may round differently
