"""The policy of the topology search: independent categoricals trained by REINFORCE (As-ViT, Algorithm 1)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..settings import SearchSettings
from ..topology import SearchSpace, Topology

INITIAL_SCALE = 1e-3  # spread of the initial logits: the policy starts uniform to 1e-3


class Policy:
    """One categorical distribution per dimension of ``space``; an action is one index per dimension.

    Logits start at 1e-3 times standard normals drawn from ``generator``, or at ``logits`` (flat, or one sequence per
    dimension), in float64. The optimiser is Adam with learning rate ``lr``; the baseline is an exponential moving
    average of the rewards with ``momentum``, corrected for its start at zero.

    Raises InputError when the number of logits does not fit the space, or an option is out of range.
    """

    def __init__(
        self,
        space: SearchSpace,
        logits: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        lr: float = SearchSettings.lr,
        momentum: float = SearchSettings.momentum,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(f"policy: lr must be a positive number, got {lr}")
        if not 0 <= momentum < 1:
            raise InputError(f"policy: momentum must be from 0 to below 1, got {momentum}")
        self.space = space
        self.momentum = momentum
        self._sizes = [len(choices) for choices in space.dimensions.values()]
        if logits is None:
            initial = INITIAL_SCALE * torch.randn(sum(self._sizes), generator=generator, dtype=torch.float64)
        else:
            initial = _flat(logits)
        if initial.shape != (sum(self._sizes),):
            raise InputError(f"policy: the space needs {sum(self._sizes)} logits, got shape {tuple(initial.shape)}")
        self.logits = initial.requires_grad_(True)  # [choices of all dimensions]
        self._optimizer = torch.optim.Adam([self.logits], lr=lr)
        self._reward_sum = 0.0
        self._reward_weight = 0.0

    @property
    def baseline(self) -> float:
        """Bias-corrected moving average of the rewards so far; 0 before the first."""
        return self._reward_sum / self._reward_weight if self._reward_weight else 0.0

    def sample(self, generator: torch.Generator | None = None) -> list[int]:
        """Draw one index per dimension."""
        uniform = torch.rand(len(self._sizes), generator=generator, dtype=torch.float64)  # [dimensions]
        action = []
        for log_probs, position in zip(self._log_probs(), uniform, strict=True):
            cumulative = log_probs.detach().exp().cumsum(0)  # [choices]
            index = int(torch.searchsorted(cumulative, position, right=True))
            action.append(min(index, len(cumulative) - 1))  # the last sum may round to just below 1
        return action

    def log_prob(self, action: Sequence[int]) -> float:
        """Log-probability of an action, in nats."""
        return float(self._log_prob(action).detach())

    def entropy(self) -> float:
        """Entropy of the whole policy, in nats: 15.33 at the start for Table 1's space."""
        return -sum(float((log_probs.exp() * log_probs).sum().detach()) for log_probs in self._log_probs())

    def update(self, action: Sequence[int], reward: float) -> None:
        """One REINFORCE step on the loss -log p(action) (reward - baseline).

        The baseline takes the reward in before it is used, as the authors' code does, so the first update moves
        nothing.
        """
        if not math.isfinite(reward):
            raise InputError(f"policy: reward must be finite, got {reward}")
        self._reward_sum = self.momentum * self._reward_sum + (1 - self.momentum) * reward
        self._reward_weight = self.momentum * self._reward_weight + (1 - self.momentum)
        loss = -self._log_prob(action) * (reward - self.baseline)  # []
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def best(self) -> Topology:
        """The most probable topology: the most probable choice of each dimension, the first one of equals."""
        return self.space.topology(next(self.ranked()))

    def ranked(self) -> Iterator[list[int]]:
        """All actions of the space from the most to the least probable, made as they are asked for."""
        sorted_dimensions = []  # per dimension: (loss of log-probability against the best choice, index), ascending
        for log_probs in self._log_probs():
            values = log_probs.tolist()
            sorted_dimensions.append(sorted((max(values) - value, index) for index, value in enumerate(values)))

        def entry(ranks: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
            return sum(choices[rank][0] for choices, rank in zip(sorted_dimensions, ranks, strict=True)), ranks

        heap = [entry((0,) * len(self._sizes))]
        while heap:
            _, ranks = heapq.heappop(heap)
            yield [choices[rank][1] for choices, rank in zip(sorted_dimensions, ranks, strict=True)]
            # Every rank vector has one parent: the vector with its last non-zero rank lowered by one.
            last = max((position for position, rank in enumerate(ranks) if rank), default=0)
            for position in range(last, len(ranks)):
                if ranks[position] + 1 < self._sizes[position]:
                    child = (*ranks[:position], ranks[position] + 1, *ranks[position + 1 :])
                    heapq.heappush(heap, entry(child))

    def state_dict(self) -> dict[str, Any]:
        """Everything that further updates depend on."""
        return {
            "logits": self.logits.detach().clone(),
            "optimizer": self._optimizer.state_dict(),
            "reward_sum": self._reward_sum,
            "reward_weight": self._reward_weight,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of a policy over the same space."""
        if state["logits"].shape != self.logits.shape:
            raise InputError(f"policy: state of {len(state['logits'])} logits, the space needs {len(self.logits)}")
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._reward_sum = state["reward_sum"]
        self._reward_weight = state["reward_weight"]

    def _log_probs(self) -> list[Tensor]:
        """Log-probabilities of each dimension's choices: [choices] each."""
        return [torch.log_softmax(part, dim=0) for part in self.logits.split(self._sizes)]

    def _log_prob(self, action: Sequence[int]) -> Tensor:
        self.space.topology(action)  # raises for an action that is not of this space
        return torch.stack([part[index] for part, index in zip(self._log_probs(), action, strict=True)]).sum()


def _flat(logits: Tensor | Sequence[Any]) -> Tensor:
    if not isinstance(logits, Tensor):
        rows = [torch.as_tensor(row, dtype=torch.float64).reshape(-1) for row in logits]
        logits = torch.cat(rows) if rows else torch.empty(0)
    flat = logits.detach().to("cpu", torch.float64).reshape(-1).clone()
    if not bool(flat.isfinite().all()):
        raise InputError("policy: logits must be finite")
    return flat
