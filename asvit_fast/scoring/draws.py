"""What a score draws at random, each a pure function of its seed: networks, circles, images."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import computing_device
from ..errors import InputError
from ..models import AsViT, create_model
from ..models.library import create_by_name, takes_size
from ..settings import ScoreSettings
from ..topology import Topology
from .curve import circle
from .replica import replica

Target = Topology | nn.Module | str
Seed = int | tuple[int, ...]

# What a random stream is for: streams of different purposes never coincide.
WEIGHTS, CONVOLUTION, CIRCLE, IMAGES, DRAWS = range(5)

_torch_generator = threading.Lock()  # held while weights are drawn from torch's own generator


def stream(*key: int) -> torch.Generator:
    """A random generator that is a pure function of its key (non-negative integers)."""
    state = np.random.SeedSequence([int(part) for part in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def root_of(seed: Seed) -> int:
    return seed if isinstance(seed, int) else seed[0]


def blank_network(topology: Topology, settings: ScoreSettings) -> AsViT:
    """The network of a topology on the CPU, in evaluation mode; its weights are whatever the memory held."""
    with torch.device("meta"):
        model = create_model(topology, img_size=settings.image_shape[1:], num_classes=0, weight_init="skip")
    return model.to_empty(device="cpu").eval()


def redraw(model: AsViT, repeat: int, settings: ScoreSettings, seed: Seed) -> None:
    """Give a network on the CPU the weights of network number ``repeat``."""
    key = (seed,) if isinstance(seed, int) else seed
    model.init_weights(generator=stream(*key, WEIGHTS, repeat))
    if settings.convention == "reference":  # the authors' code draws the convolution once for all repeats
        model.init_convolution(stream(*key, CONVOLUTION))


def draw(target: Topology | nn.Module | str, repeat: int, settings: ScoreSettings, seed: Seed) -> nn.Module:
    """Network number ``repeat``, on the device of the settings; a module stays on its own unless they name another."""
    device = computing_device(settings.device)
    if isinstance(target, nn.Module):
        moves = settings.device is not None and placement(target)[0] != device
        return copy.deepcopy(target).eval().to(device) if moves else replica(target)
    key = (seed,) if isinstance(seed, int) else seed
    if isinstance(target, Topology):
        model = blank_network(target, settings)
        redraw(model, repeat, settings, seed)
        return model.to(device)
    options: dict[str, Any] = {"img_size": settings.image_shape[1:]} if takes_size(target) else {}
    cpu = torch.device("cpu")
    with _torch_generator, cpu, drawing_from(stream(*key, WEIGHTS, repeat), cpu):
        try:
            return create_by_name(target, **options).eval().to(device)
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot build {target!r} for images of {settings.image_shape}: {error}") from error


@contextmanager
def drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """torch's generators, of the CPU and of ``device``, draw what ``generator``'s seed decides, and forget it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(generator.initial_seed())
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(generator.initial_seed())
        yield


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's parameters."""
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


@functools.lru_cache(maxsize=1)  # the same for all networks of a search, and slow to draw
def standard_normal_images(shape: tuple[int, ...], root: int) -> Tensor:
    return torch.randn(shape, generator=stream(root, IMAGES))


@functools.lru_cache(maxsize=8)  # of the repeats, the same for all topologies of a search
def circle_of(shape: tuple[int, ...], root: int, repeat: int) -> tuple[Tensor, Tensor]:
    return circle(shape, stream(root, CIRCLE, repeat))
