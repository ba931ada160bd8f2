"""Measures of candidates: the tasks they are cut into, which any process can do, and their means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..backends import rank_device
from ..cost import Cost, topology_cost
from ..errors import InputError
from ..images import fingerprint
from ..latency import LatencyModel
from ..scoring.score import load, score_networks
from ..settings import ScoreSettings, check_seed
from ..topology import Topology
from .distributed import Share

Scorer = Callable[[Topology], Mapping[str, float]]
Images = Tensor | str | Path | None

METRICS = ("length_distortion", "ntk_condition")


class Measures(NamedTuple):
    """``length_distortion``: larger is better; ``ntk_condition``: smaller is better, infinite when degenerate."""

    length_distortion: float
    ntk_condition: float


class Task(NamedTuple):
    """One network to score: repeat ``repeat`` of ``topology`` in step ``step``."""

    topology: Topology
    step: int
    repeat: int


class Evaluator:
    """Scores topologies: the mean over ``repeats`` initialisations, or whatever ``scorer`` returns.

    A repeat is a pure function of (seed, step, repeat), so it matters neither when nor where it is computed.
    Raises InputError for options and images that cannot be used.
    """

    def __init__(
        self, settings: ScoreSettings, images: Images = None, seed: int = 0, scorer: Scorer | None = None
    ) -> None:
        check_seed(seed)
        self.device = rank_device(settings.device)
        self.settings = replace(settings, metrics=METRICS, device=self.device)
        self.scorer = scorer
        self.seed = seed
        self.latency: LatencyModel | None = None  # of the networks that may be drawn, where a budget asks for it
        self.pos_embed = "absolute" if settings.convention == "paper" else "none"
        self.repeats = settings.repeats if scorer is None else 1
        self.images = load(images, self.settings) if scorer is None else None  # [batch, 3, H, W]
        recorded = ("convention", "img_size", "repeats", "thetas", "batch", "norms")
        self.config = {
            "scorer": "default" if scorer is None else "custom",
            "images": None if self.images is None else fingerprint(self.images),
            "seed": seed,
            **{name: getattr(settings, name) for name in recorded},
            "pos_embed": self.pos_embed,
        }

    def cost(self, topology: Topology) -> Cost:
        """The cost that budgets and limits look at: of the network at the run's image size, with 1000 classes.

        In the "paper" convention the one that ``export`` writes, position embedding included; in the "reference"
        convention without it, as the authors count.
        """
        cost = topology_cost(topology, self.settings.img_size, pos_embed=self.pos_embed)
        return cost if self.latency is None else replace(cost, latency_ms=self.latency(topology))

    def work(self, tasks: Sequence[Task]) -> list[tuple[float, ...]]:
        """Do tasks: the values of METRICS of each. Scorers of users are called one at a time."""
        if self.scorer is not None:
            return [_values(self.scorer(task.topology)) for task in tasks]
        # The seed alone decides circles and images, shared by all candidates; seed and step decide the weights.
        networks = [(task.topology, task.repeat, (self.seed, task.step)) for task in tasks]
        results = score_networks(networks, self.settings, self.images, self.device)
        return [tuple(result[metric]["value"] for metric in METRICS) for result in results]

    def measure(self, share: Share[Task], topologies: Sequence[Topology], step: int) -> list[Measures]:
        """Measures of each topology, the repeats of all of them spread over the processes."""
        tasks = [Task(topology, step, repeat) for topology in topologies for repeat in range(self.repeats)]
        values = share(tasks)
        groups = [values[start : start + self.repeats] for start in range(0, len(values), self.repeats)]
        return [Measures(*(sum(column) / self.repeats for column in zip(*group, strict=True))) for group in groups]


def _values(scores: Any) -> tuple[float, ...]:
    """The values of METRICS that a user's scorer returned."""
    if not isinstance(scores, Mapping) or any(metric not in scores for metric in METRICS):
        raise InputError(f"scorer must return a mapping with {' and '.join(METRICS)}, got {scores!r}")
    try:
        return tuple(float(scores[metric]) for metric in METRICS)
    except (TypeError, ValueError):
        raise InputError(f"scorer must return numbers, got {scores!r}") from None
