"""Which images a batch holds, and with which random numbers they are augmented: functions of seed, epoch and position.

Nothing here depends on worker processes, on interruptions or on how batches were cut before.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

SeedWords = Sequence[int]


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of all images in one epoch: int64 ``[images]``, a permutation."""
    generator = torch.Generator().manual_seed(to_seed(seed_words(seed, epoch)))
    return torch.randperm(images, generator=generator)


def shard(order: Tensor, rank: int, ranks: int) -> Tensor:
    """Every ``ranks``-th of ``order`` from the ``rank``-th on: what the ranks read at one time are neighbours in it."""
    return order[rank::ranks]


def seed_words(*keys: int) -> list[int]:
    """Four well-mixed 32-bit numbers that stand for ``keys``, such as (seed, epoch, index)."""
    return [int(word) for word in np.random.SeedSequence(keys).generate_state(4)]


def to_seed(seeds: SeedWords) -> int:
    """A seed of 63 bits, as torch takes it, of the first two numbers."""
    return (seeds[0] << 31) ^ seeds[1]


def seed_all(seeds: SeedWords) -> None:
    """Seed what decoding and augmentation draw from on the CPU: Python's random, numpy, torch. No GPU is touched."""
    random.seed(to_seed(seeds))
    np.random.seed(list(seeds))  # noqa: NPY002  augmentations draw from numpy's global state
    torch.default_generator.manual_seed(to_seed(seeds))


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """The global states that ``seed_all`` sets are afterwards what they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
