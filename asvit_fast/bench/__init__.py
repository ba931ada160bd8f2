"""Benchmarks of networks and ops against their peers; tuning of kernels' tiles on the shapes of real networks."""

from .networks import benchmark
from .rows import BenchRow

__all__ = ["BenchRow", "benchmark"]
