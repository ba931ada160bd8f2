"""Limits on the cost of a topology, checked before anything is scored."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..cost import Cost
from ..errors import InputError
from ..topology import SearchSpace, Topology

Window = tuple[float | None, float | None]

ENUMERATE_UP_TO = 20_000  # topologies; a larger space is probed with as many random ones
_UNITS = {"params": "parameters", "flops": "FLOPs (multiply-adds)", "latency_ms": "ms"}


@dataclass(frozen=True)
class Budget:
    """Windows (lowest, highest) that a topology's cost must lie in, ends included; None or infinity leaves an end open.

    ``params`` counts parameters, ``flops`` multiply-adds of one image, ``latency_ms`` milliseconds of a forward pass on
    the machine at hand, measured block by block (``latency.py``). Raises InputError for a window that is no pair,
    is negative or is upside down.

    Examples:
        >>> import asvit_fast as af
        >>> af.Budget(params=(1e6, 2e6), flops=(None, 1e9)).params
        (1000000.0, 2000000.0)
    """

    params: Window | None = None
    flops: Window | None = None
    latency_ms: Window | None = None

    def __post_init__(self) -> None:
        for name in _UNITS:
            object.__setattr__(self, name, _window(name, getattr(self, name)))

    def reject(self, cost: Cost) -> str | None:
        """Why a topology of this cost is outside the budget, or None when it fits."""
        for name, unit in _UNITS.items():
            low, high = getattr(self, name) or (None, None)
            value = getattr(cost, name)
            if value is None:
                continue
            if low is not None and value < low:
                return f"{_text(value)} {unit} < {_text(low)}"
            if high is not None and value > high:
                return f"{_text(value)} {unit} > {_text(high)}"
        return None

    def to_dict(self) -> dict[str, list[float | None] | None]:
        """Plain lists, for JSON."""
        return {name: None if (window := getattr(self, name)) is None else list(window) for name in _UNITS}

    def check_possible(self, space: SearchSpace, cost_of: Callable[[Topology], Cost], width: int) -> list[str]:
        """Raise InputError when no topology of the space can fit; say which windows hold all of them anyway.

        Costs add up over the dimensions once ``heads`` is chosen, so the cheapest and the dearest topology are found
        dimension by dimension. What these extremes leave open is settled by enumerating a small space, or by drawing
        20,000 topologies of a large one: a budget that none of them meets would stall every step of a search.
        """
        idle = []
        for name, unit in _UNITS.items():
            low, high = getattr(self, name) or (None, None)
            if low is None and high is None:
                continue
            value_of = functools.partial(lambda get, topology: get(cost_of(topology)), operator.attrgetter(name))
            least, most = _extreme(space, value_of, width, min), _extreme(space, value_of, width, max)
            facts = f"the topologies of the space at width {width} have {_text(least)} to {_text(most)} {unit}"
            if (high is not None and least > high) or (low is not None and most < low):
                ends = [f"at least {_text(low)}"] * (low is not None) + [f"at most {_text(high)}"] * (high is not None)
                raise InputError(f"budget: {name} must be {' and '.join(ends)}, but {facts}; change the budget")
            if (high is None or most <= high) and (low is None or low <= least):
                ends = [f"from {_text(low)}"] * (low is not None) + [f"up to {_text(high)}"] * (high is not None)
                idle.append(f"budget: {name} {' '.join(ends)} excludes nothing, as {facts}")
        if space.size <= ENUMERATE_UP_TO:
            candidates = space.enumerate(width)
        else:
            generator = torch.Generator().manual_seed(0)
            candidates = (space.sample(generator, width) for _ in range(ENUMERATE_UP_TO))
        if all(self.reject(cost_of(topology)) for topology in candidates):
            tried = min(space.size, ENUMERATE_UP_TO)
            raise InputError(f"budget: none of {tried:,} topologies tried fits {self}; widen the budget")
        return idle


def _window(name: str, window: Window | None) -> Window | None:
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InputError(f"budget: {name} must be a pair (lowest, highest) or None, got {window!r}")
    for end in window:
        if end is not None and (isinstance(end, bool) or not isinstance(end, (int, float)) or not end >= 0):
            raise InputError(f"budget: {name} must hold numbers from 0 up, or None for an open end, got {end!r}")
    low, high = (None if end is None or math.isinf(end) else end for end in window)
    if low is not None and high is not None and low > high:
        raise InputError(f"budget: {name} has lowest {_text(low)} above highest {_text(high)}; swap them")
    return (low, high)


def _extreme(space: SearchSpace, value_of: Callable[[Topology], float], width: int, pick: Callable[..., Any]) -> float:
    """The smallest (``pick=min``) or largest (``max``) cost of any topology of the space."""
    names = list(space.dimensions)
    extremes = []
    for heads in range(len(space.dimensions["heads"])):
        action = [0] * len(names)
        action[names.index("heads")] = heads
        for position, name in enumerate(names):
            if name != "heads":
                options = [
                    [*action[:position], index, *action[position + 1 :]] for index in range(len(space.dimensions[name]))
                ]
                action = pick(options, key=lambda option: value_of(space.topology(option, width)))
        extremes.append(value_of(space.topology(action, width)))
    return pick(extremes)


def _text(end: float | None) -> str:
    if end is None:
        return "any"
    return f"{end:,.0f}" if end >= 1000 or end == int(end) else f"{end:.4g}"
