"""Weights of several networks of one topology, stacked: one piece of memory, one copy to a GPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from ..models import AsViT
from ..nn import WindowAttention
from ..settings import ScoreSettings
from ..topology import Topology
from .draws import Seed, blank_network, redraw
from .parallel import map_in_threads, worker_count
from .patch_merge import channels_last_features

CPU = torch.device("cpu")

ALIGNMENT = 64  # numbers between which weights begin: products read 16 bytes at a time


@dataclass(frozen=True)
class StackedWeights:
    """``weights[name]`` is [networks, *shape]: of the parameter of that name, for the layouts of ``StackedNetworks``.

    Attributes:
        flat: all of them, one after the other.
        places: name -> (offset, [networks, *shape]).
        neutral: names of those that do nothing in any network: biases that are 0, norms' weights that are 1.
    """

    flat: Tensor
    places: dict[str, tuple[int, tuple[int, ...]]]
    neutral: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        offset, shape = self.places[name]
        return self.flat[offset : offset + math.prod(shape)].view(shape)

    def get(self, name: str) -> Tensor | None:
        """The same; None if there is no such parameter, or leaving it out gives the same numbers."""
        return None if name in self.neutral or name not in self.places else self[name]

    def at(self, flat: Tensor) -> StackedWeights:
        """The same weights in another piece of memory."""
        return replace(self, flat=flat)


def stack_weights(
    topology: Topology, networks: Sequence[tuple[int, Seed]], settings: ScoreSettings, pinned: bool
) -> StackedWeights:
    """Draw the networks (repeat, seed) of a topology, in main memory; ``pinned``: a GPU can fetch them by itself."""
    model = blank_network(topology, settings)
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    size = 0
    for name, weight in _arranged(model):
        shape = (len(networks), *weight.shape)
        places[name] = (size, shape)
        size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
    dtype = model.patch_embed.proj.weight.dtype
    # zeros: what alignment leaves between weights is copied, too
    stacked = StackedWeights(torch.zeros(size, dtype=dtype, pin_memory=pinned), places)
    models: SimpleQueue[AsViT] = SimpleQueue()  # one for each worker
    for worker in range(worker_count(len(networks), CPU)):
        models.put(_with_memory_of_its_own(model) if worker else model)

    def draw_into(place: int) -> None:
        own = models.get()
        repeat, seed = networks[place]
        redraw(own, repeat, settings, seed)
        for name, weight in _arranged(own):
            stacked[name][place].copy_(weight)
        models.put(own)

    map_in_threads(draw_into, range(len(networks)), CPU)
    return replace(stacked, neutral=frozenset(name for name in places if _is_neutral(name, stacked[name])))


def _with_memory_of_its_own(model: AsViT) -> AsViT:
    """The same network with other, uninitialised weights."""
    memory: dict[int, Any] = {id(weight): nn.Parameter(torch.empty_like(weight)) for weight in model.parameters()}
    return copy.deepcopy(model, memory)


def _is_neutral(name: str, weight: Tensor) -> bool:
    if name.endswith(".bias"):
        return not weight.any()
    return "norm" in name and bool((weight == 1).all())


@torch.no_grad()
def _arranged(model: AsViT) -> Iterator[tuple[str, Tensor]]:
    """Parameters that the scored features depend on. Rows of a query-key-value projection are ordered [heads, 3, d], so
    that the heads of all networks are evenly spaced; features of a patch [K, K, channels]."""
    for prefix, module in model.named_modules():
        if not prefix.startswith(("patch_embed.", "stages.")):
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            name, weight = f"{prefix}.{kind}", parameter.detach()
            if prefix.endswith("attn.qkv"):
                attention = model.get_submodule(prefix.removesuffix(".qkv"))
                assert isinstance(attention, WindowAttention)
                weight = weight.unflatten(0, (3, attention.num_heads, attention.head_dim)).transpose(0, 1).flatten(0, 2)
            elif name == "patch_embed.proj.weight":
                weight = weight.permute(0, 2, 3, 1).flatten(1)  # [C, K*K*Cin]
            elif ".downsample." in name:
                stage = model.get_submodule(prefix.partition(".downsample")[0])
                kernel = stage.downsample.kernel  # type: ignore[union-attr]
                weight = channels_last_features(weight, weight.shape[-1] // kernel**2, "unfold")  # type: ignore[operator]
            yield name, weight
