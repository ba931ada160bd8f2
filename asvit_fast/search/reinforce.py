"""Topology search without training (As-ViT, arXiv 2202.11921, Algorithm 1)."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..cost import Cost, topology_cost
from ..errors import InputError
from ..files import as_float
from ..run_directory import RunDirectory
from ..topology import DEFAULT_WIDTH, SearchSpace, Topology
from .budget import Budget
from .distributed import Share, run_shared
from .evaluation import METRICS, Evaluator, Images, Scorer, Task
from .policy import Policy
from .reward import RewardHistory

MAX_REJECTED = 1000  # draws of one step outside the budget
_COUNTS = ("params", "flops", "steps", "entropy")


@dataclass(frozen=True)
class SearchResult:
    """The topology that a search found and how.

    ``topology`` is the most probable one of the final policy (that fits the budget), ``length_distortion`` and
    ``ntk_condition`` its measures, ``params`` and ``flops`` (multiply-adds) its cost, ``entropy`` the final policy's in
    nats, ``trace`` one record a step as in trace.jsonl.
    """

    topology: Topology
    length_distortion: float
    ntk_condition: float
    params: int
    flops: int
    steps: int
    entropy: float
    trace: list[dict[str, Any]] = field(repr=False)
    policy: Policy = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of result.json."""
        values = {name: getattr(self, name) for name in (*METRICS, *_COUNTS)}
        return {"kind": "search", "topology": str(self.topology), **values}

    @classmethod
    def from_dict(cls, stored: dict[str, Any], trace: list[dict[str, Any]], policy: Policy) -> SearchResult:
        """What ``to_dict`` wrote, with the trace and the policy that belong to it."""
        values = {**{name: stored[name] for name in _COUNTS}, **_with_floats({name: stored[name] for name in METRICS})}
        return cls(Topology.parse(stored["topology"]), **values, trace=trace, policy=policy)


def search(
    space: SearchSpace | None = None,
    steps: int = 500,
    images: Images = None,
    seed: int = 0,
    budget: Budget | None = None,
    convention: str = "paper",
    out: str | os.PathLike[str] | None = None,
    img_size: int | tuple[int, int] = 224,
    repeats: int = 5,
    thetas: int = 10,
    batch: int = 16,
    width: int = DEFAULT_WIDTH,
    norms: str = "auto",
    device: str | torch.device | None = None,
    scorer: Scorer | None = None,
    progress: bool = True,
    history: int = 20,
    lr: float = 0.08,
    momentum: float = 0.9,
) -> SearchResult:
    """Find a topology whose untrained networks have a large length distortion and a small NTK condition number.

    Each step draws a topology from the policy, scores it, and follows the gradient of log p(topology) (reward -
    baseline); the reward is the change of both measures against the previous step, relative to the range seen. The
    result is the most probable topology of the final policy. It is a pure function of the arguments: a run that was
    killed continues from ``out`` and ends as if it had not been. Under torchrun the repeats are shared over all
    processes, with the same result.

    Args:
        space: the choices; by default Table 1 of the paper, 4,556,250 topologies.
        steps: topologies to score.
        images: what the NTK looks at: a folder, a tensor [B, 3, H, W], or None for standard normal noise.
        seed: of policy, weights, circles and noise.
        budget: topologies outside are rejected before they are scored, logged with the reason, and another is drawn;
            after 1000 in one step the most probable one that fits is taken. The result fits too.
        convention: "paper", or "reference" for the numbers of the authors' code (scores and rewards).
        out: run directory (config.json, trace.jsonl, state.pt, result.json), made or continued; None keeps all in
            memory.
        img_size: pixels, int or (height, width). repeats: initialisations per topology. thetas: points on the circle.
        batch: images for the NTK. width: channels of the first stage. norms: of the network whose curve is measured.
        device: a GPU if there is one, by default.
        scorer: replaces the scores: topology -> {"length_distortion": float, "ntk_condition": float}.
        progress: show a progress bar.
        history: values in the range of the "reference" reward. lr, momentum: Adam's rate, the baseline's momentum.

    Raises:
        InputError: an option that cannot be used, a budget that no topology fits, a run directory that is read-only, in
            use, damaged or of other options - all before anything is scored; later, a full disk.
    """
    space = SearchSpace() if space is None else space
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be an integer of at least 1, got {steps!r}")
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
    run = _Search(space, steps, evaluator, budget, convention, img_size, width, history, lr, momentum)

    def lead(share: Share[Task]) -> SearchResult:
        with RunDirectory(out, run.config) as directory:
            return run.run(directory, share, progress)

    return run_shared(lead, evaluator.work, evaluator.device)


class _Search:
    """The state of a search: policy, generator, rewards. What a step does to it depends on nothing else."""

    def __init__(
        self,
        space: SearchSpace,
        steps: int,
        evaluator: Evaluator,
        budget: Budget | None,
        convention: str,
        img_size: int | tuple[int, int],
        width: int,
        history: int,
        lr: float,
        momentum: float,
    ) -> None:
        self.space, self.steps, self.evaluator = space, steps, evaluator
        self.budget, self.img_size, self.width = budget or Budget(), img_size, width
        self.generator = torch.Generator().manual_seed(evaluator.seed)
        self.policy = Policy(space, lr=lr, momentum=momentum, generator=self.generator)
        self.rewards = RewardHistory(convention, history)
        self.config = {
            "kind": "search",
            "space": space.dimensions,
            "steps": steps,
            "budget": self.budget.to_dict(),
            "width": width,
            "history": history,
            "lr": lr,
            "momentum": momentum,
            **evaluator.config,
        }
        self.budget.check_possible(space, self.cost, width)

    def cost(self, topology: Topology) -> Cost:
        return topology_cost(topology, self.img_size)

    def run(self, directory: RunDirectory, share: Share[Task], progress: bool) -> SearchResult:
        if directory.state is not None:
            self.load_state_dict(directory.state)
        done = len(directory.trace)
        with tqdm(total=self.steps, initial=done, desc="search", unit="step", disable=not progress) as bar:
            for step in range(done, self.steps):
                record = self.step(step, share)
                directory.record(record, self.state_dict())
                bar.set_postfix_str(_progress(record), refresh=False)
                bar.update()
        trace = [_with_floats(record) for record in directory.trace]
        if directory.result is not None:
            return SearchResult.from_dict(directory.result, trace, self.policy)
        result = self.result(share, trace)
        directory.finish(result.to_dict())
        return result

    def step(self, step: int, share: Share[Task]) -> dict[str, Any]:
        """Draw, score, reward, update; the trace record."""
        start = time.perf_counter()
        action, topology, rejected = self.draw()
        measures = self.evaluator.measure(share, [topology], step)[0]
        reward = self.rewards.add(*measures)
        log_prob, entropy = self.policy.log_prob(action), self.policy.entropy()
        self.policy.update(action, reward)
        cost = self.cost(topology)
        return {
            "step": step,
            "topology": str(topology),
            "action": action,
            **measures._asdict(),
            "reward": reward,
            "baseline": self.policy.baseline,
            "log_prob": log_prob,
            "entropy": entropy,
            "best": str(self.best()),
            "params": cost.params,
            "flops": cost.flops,
            "seconds": time.perf_counter() - start,
            "rejected": rejected,
        }

    def draw(self) -> tuple[list[int], Topology, list[dict[str, str]]]:
        """An action within the budget, its topology, and what was rejected before."""
        rejected: list[dict[str, str]] = []
        draws = (self.policy.sample(self.generator) for _ in range(MAX_REJECTED))
        for action in itertools.chain(draws, self.policy.ranked()):
            topology = self.space.topology(action, self.width)
            reason = self.budget.reject(self.cost(topology))
            if reason is None:
                return action, topology, rejected
            if len(rejected) < MAX_REJECTED:
                rejected.append({"topology": str(topology), "reason": reason})
        raise AssertionError("a budget that some topology fits rejects all")  # check_possible has found one

    def best(self) -> Topology:
        """The most probable topology that fits the budget."""
        topologies = (self.space.topology(action, self.width) for action in self.policy.ranked())
        return next(topology for topology in topologies if self.budget.reject(self.cost(topology)) is None)

    def result(self, share: Share[Task], trace: list[dict[str, Any]]) -> SearchResult:
        """The best topology, scored as one more step would be."""
        topology = self.best()
        cost = self.cost(topology)
        measures = self.evaluator.measure(share, [topology], self.steps)[0]
        entropy = self.policy.entropy()
        return SearchResult(
            topology, *measures, cost.params, cost.flops, self.steps, entropy, trace=trace, policy=self.policy
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "generator": self.generator.get_state(),
            "rewards": self.rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.generator.set_state(state["generator"])
        self.rewards.load_state_dict(state["rewards"])


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the measures as floats, which JSON holds as strings when they are not finite."""
    return {**record, **{name: as_float(record[name]) for name in METRICS}}


def _progress(record: dict[str, Any]) -> str:
    return (
        f"best {Topology.parse(record['best']).seed_string}, entropy {record['entropy']:.2f}, "
        f"reward {record['reward']:+.2f}, length {record['length_distortion']:.4g}, "
        f"ntk {record['ntk_condition']:.4g}, {record['seconds']:.2f} s"
    )
