"""Random numbers of a training: which images a batch holds and with which seeds they are augmented, as functions of
seed, epoch and position; and the states of the generators that everything else draws from.

Nothing here depends on worker processes, on interruptions or on how batches were cut before.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, one_line

CPU = torch.device("cpu")


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of all images in one epoch: int64 ``[images]``, a permutation."""
    return torch.randperm(images, generator=generator(seed, epoch))


def seed_words(*keys: int) -> list[int]:
    """Four well-mixed 32-bit numbers that stand for ``keys``, such as (seed, epoch, index)."""
    return [int(word) for word in np.random.SeedSequence(keys).generate_state(4)]


def to_seed(words: Sequence[int]) -> int:
    """A seed of 63 bits, as torch takes it, of the first two words."""
    return (words[0] << 31) ^ words[1]


def generator(*keys: int) -> torch.Generator:
    """A generator on the CPU for ``keys``."""
    return torch.Generator().manual_seed(to_seed(seed_words(*keys)))


def seed_augmentation(words: Sequence[int]) -> None:
    """Seed what decoding and augmentation draw from on the CPU: Python's random, numpy, torch. No GPU is touched."""
    random.seed(to_seed(words))
    np.random.seed(list(words))  # noqa: NPY002  augmentations draw from numpy's global state
    torch.default_generator.manual_seed(to_seed(words))


def seed_everything(seed: int, device: torch.device) -> None:
    """A start of its own for each seed, for a process and its GPU."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def random_state(device: torch.device = CPU) -> dict[str, Any]:
    """The state of every generator that this process draws from, of what a checkpoint can hold."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  timm's Mixup draws from it
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device = CPU) -> None:
    """Undo what was drawn since ``random_state``. Raises InputError for what is not such a state."""
    try:
        torch.set_rng_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        version, words, gauss_next = state["python"]
        random.setstate((version, tuple(words), gauss_next))
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint is damaged: its random states cannot be used ({one_line(error)})") from error


@contextlib.contextmanager
def preserved_random_state(device: torch.device = CPU) -> Iterator[None]:
    """Put the generators back to where they were, whatever is drawn inside."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
