"""The network and the inputs that a benchmark runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import restore
from ..acceleration.verify import named_tensors
from ..errors import InputError
from ..export import open_network
from ..models.foreign import create_foreign, input_shape
from ..models.library import pretrained_config
from ..modes import without_dropout
from ..settings import ImageSize
from ..topology import Topology
from ..what import resolve

DISTINCT = 8  # images that differ: larger batches repeat them, so that what a batch must give is known from a few


@dataclass(frozen=True)
class Sample:
    """What a network is called with, the batch first in every tensor: a tensor, a tuple, or a dict of named inputs.

    A batch repeats its first images: its loss and gradients are those of the images that it repeats.
    """

    value: Any

    @classmethod
    def random(cls, shape: tuple[int, ...], seed: int) -> Sample:
        """Normal noise, images of this shape."""
        return cls(torch.randn(DISTINCT, *shape, generator=torch.Generator().manual_seed(seed)))  # [8, C, H, W]

    def __post_init__(self) -> None:
        sizes = {tuple(x.shape)[:1] for _, x in named_tensors("sample", self.value)}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise InputError(
                "sample must be a tensor, a tuple or a dict of tensors whose first axis is the batch, got "
                f"{_shapes(self.value) or type(self.value).__name__}"
            )

    @property
    def images(self) -> int:
        """The size of its batch."""
        return next(x.shape[0] for _, x in named_tensors("sample", self.value))

    @property
    def shape(self) -> str:
        """Of one image: 3x224x224."""
        return _shapes(self.value)

    def distinct(self, batch: int) -> int:
        """How many images a batch of this size repeats: the largest divisor of it that is at hand."""
        return max(number for number in range(1, min(self.images, DISTINCT, batch) + 1) if batch % number == 0)

    def batch(self, size: int, of: int, place: Callable[[Tensor], Tensor]) -> Sample:
        """A batch of ``size`` that repeats the first ``of`` images; ``place`` moves each tensor."""
        index = torch.arange(size) % of  # [size]
        return Sample(_mapped(self.value, lambda x: place(x.detach().cpu()[index])))

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's output."""
        if isinstance(self.value, Mapping):
            return model(**self.value)
        return model(*self.value) if isinstance(self.value, tuple) else model(self.value)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    return tuple(_mapped(item, function) for item in value) if isinstance(value, (tuple, list)) else value


def _shapes(value: Any) -> str:
    return ", ".join("x".join(map(str, x.shape[1:])) for _, x in named_tensors("sample", value))


@dataclass(frozen=True)
class Source:
    """A network as its library makes it, on the CPU in float32, without dropout, which would differ each time."""

    name: str
    model: nn.Module
    sample: Sample


def open_source(
    what: str | Path | Topology | nn.Module, sample: Any = None, img_size: ImageSize | None = None, seed: int = 0
) -> Source:
    """The network that ``what`` names, its own weights where it has some, and what it is called with.

    A network that is given stays as it is: a copy is restored from ``accelerate`` and switched to float32.

    Raises:
        InputError: as ``what.resolve`` and ``models.foreign``; a sample without a batch.
    """
    if isinstance(what, nn.Module):
        name, model = type(what).__name__, restore(copy.deepcopy(what)).cpu().float()
        shape = input_shape(model, img_size)
    elif callable(what):
        raise InputError(f"{getattr(what, '__name__', what)} is a function or class; give the network that it returns")
    else:
        name = str(what)
        model, shape = _named(what, img_size, seed)
    model = without_dropout(model, stochastic_depth=True)
    return Source(name, model, Sample.random(shape, seed) if sample is None else Sample(sample))


def _named(
    what: str | Path | Topology, img_size: ImageSize | None, seed: int
) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network, and the shape of its images."""
    target = resolve(what, foreign=True)
    if target.foreign:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_foreign(str(target.name), img_size)
        return model, input_shape(model, img_size)
    if target.weights is not None:
        built = target.load()
        shape = built.data_config(img_size)["input_size"]
        built.fit_to(shape[1:])
        return built.model, shape
    if img_size is None and target.run is None:
        img_size = tuple(pretrained_config(str(target.name)).get("input_size", (3, 224, 224))[1:])
    built = open_network(what, seed, img_size=img_size).built
    return built.model, built.data_config()["input_size"]
