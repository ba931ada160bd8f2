"""Rules of growth that look at no scores, against which Algorithm 2 is compared (As-ViT, Table 7 and Figure 3).

They take the same steps as Algorithm 2, one more block in one stage and a width 5 to 20 % larger, so that runs differ
in what they choose alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..scoring.draws import stream
from ..topology import Topology

_DRAWS = 2**31 + 4  # key of the stream that random choices are drawn from


class GrowthRule(Protocol):
    """Chooses one of the candidates of a step that fit the limit."""

    def __call__(self, reached: Topology, candidates: Sequence[Topology], seed: int, step: int) -> Topology: ...


@dataclass(frozen=True)
class FixedRule:
    """``depths``: the proportions of the four stages that growth keeps to; ``growth``: of the width in each step."""

    depths: tuple[int, int, int, int]
    growth: float

    def __call__(self, reached: Topology, candidates: Sequence[Topology], seed: int, step: int) -> Topology:
        """The stage that lacks most blocks, the width nearest to the rule's, the smaller one of equals."""

        def distance(candidate: Topology) -> tuple[float, float]:
            stage = next(i for i, (a, b) in enumerate(zip(reached.depths, candidate.depths, strict=True)) if a != b)
            return reached.depths[stage] / self.depths[stage], abs(candidate.width - reached.width * (1 + self.growth))

        return min(candidates, key=distance)


def random_rule(reached: Topology, candidates: Sequence[Topology], seed: int, step: int) -> Topology:
    """Any of the candidates, each as likely as any other."""
    generator = stream(seed, _DRAWS, step)
    return candidates[int(torch.randint(len(candidates), (), generator=generator))]


GROWTH_RULES: dict[str, GrowthRule] = {
    "random": random_rule,
    # Swin (arXiv 2103.14030): depths of Swin-T; from T to B the depth doubles and the width grows by a third
    "swin": FixedRule((1, 1, 3, 1), 0.05),
    # ViT (arXiv 2010.11929) and DeiT: from Ti to B the width grows fourfold and the depth stays
    "vit": FixedRule((1, 1, 1, 1), 0.20),
    # ResNet (arXiv 1512.03385): depths of ResNet-50; larger ones grow in depth alone, here the width by the least there
    # is. From depths of 1 the third stage comes first, as with Swin's, so that few steps may end the same.
    "resnet": FixedRule((3, 4, 6, 3), 0.05),
    "uniform": FixedRule((1, 1, 1, 1), 0.10),
}
