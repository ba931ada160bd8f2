"""Topology search (As-ViT, Algorithm 1) and scaling (Algorithm 2), without training."""

from .budget import Budget
from .policy import Policy
from .reinforce import SearchResult, search
from .reward import RewardHistory, reward_sequence
from .scaling import Candidate, ScaleStep, scale

__all__ = [
    "Budget",
    "Candidate",
    "Policy",
    "RewardHistory",
    "ScaleStep",
    "SearchResult",
    "reward_sequence",
    "scale",
    "search",
]
