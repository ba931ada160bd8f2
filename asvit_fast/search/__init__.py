"""Topology search (As-ViT, Algorithm 1) and scaling (Algorithm 2), without training."""

from .budget import Budget
from .policy import Policy
from .reinforce import search
from .result import Baseline, ScoredTopology, SearchResult, best_sampled
from .reward import RewardHistory, reward_sequence
from .scaling import Candidate, ScaleStep, scale

__all__ = [
    "Baseline",
    "Budget",
    "Candidate",
    "Policy",
    "RewardHistory",
    "ScaleStep",
    "ScoredTopology",
    "SearchResult",
    "best_sampled",
    "reward_sequence",
    "scale",
    "search",
]
