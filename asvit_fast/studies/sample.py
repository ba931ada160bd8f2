"""The topologies of a study: the first n of a sequence that space, width, seed and kind of sampling decide."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

from ..scoring.draws import stream
from ..topology import SearchSpace, Topology

STRATA = 8  # of equally many topologies, by number of parameters
POOL = 4096  # topologies that are drawn to find the borders between them
_DRAWS, _BORDERS = 2**31 + 1, 2**31 + 2  # keys of the streams


def sample(
    space: SearchSpace, count: int, width: int, sampling: str, seed: int, params_of: Callable[[Topology], int]
) -> list[Topology]:
    """Draw ``count`` different topologies, or all where the space has fewer.

    "uniform": every topology is as likely as any other. "stratified": by turns from the smallest eighth of the space
    to the largest, so that sizes are spread evenly however few are drawn. A larger ``count`` adds topologies behind
    the others, up to all of the space.
    """
    sizes = functools.lru_cache(maxsize=None)(params_of)
    draws = _stratified(space, width, seed, sizes) if sampling == "stratified" else _uniform(space, width, seed)
    different: dict[Topology, None] = {}  # in the order of drawing
    for topology in draws:
        different[topology] = None
        if len(different) == min(count, space.size):
            break
    return list(different)


def _uniform(space: SearchSpace, width: int, seed: int) -> Iterator[Topology]:
    generator = stream(seed, _DRAWS)
    while True:
        yield space.sample(generator, width)


def _stratified(space: SearchSpace, width: int, seed: int, params_of: Callable[[Topology], int]) -> Iterator[Topology]:
    generator = stream(seed, _BORDERS)
    pool = sorted(params_of(space.sample(generator, width)) for _ in range(POOL))
    borders = [pool[part * POOL // STRATA] for part in range(1, STRATA)]
    waiting: list[list[Topology]] = [[] for _ in range(STRATA)]
    uniform = _uniform(space, width, seed)
    for turn in itertools.count():
        own = waiting[turn % STRATA]
        for _ in range(POOL):  # a stratum between equal borders is empty
            if own:
                break
            topology = next(uniform)
            params = params_of(topology)
            waiting[sum(params >= border for border in borders)].append(topology)
        if own:
            yield own.pop(0)
