"""Latencies of topologies on the machine at hand: each distinct block is timed once, a network is their sum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .backends import resolve_device
from .cost import synchronize
from .errors import InputError
from .files import from_json, to_json, write_atomic
from .models import AsViT, create_model
from .settings import ImageSize, image_sides
from .topology import NUM_STAGES, SearchSpace, StageSpec, Topology

LATENCY = "latency.json"  # of a run: what was measured, which a run that continues takes again
RUNS = 15  # of which the shortest counts
WARM_UP = 3
CHECKED = 6  # random networks that are timed whole and held against their sums


class _Conditions(TypedDict):
    """What measurements were made of and on: fields of ``LatencyModel``."""

    batch_size: int
    img_size: tuple[int, int]
    width: int
    device: str


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a forward pass of ``batch_size`` images without gradients.

    ``pieces``: of each distinct piece, by its key; ``checks``: (sum, whole network) in milliseconds of random networks.
    """

    batch_size: int
    img_size: tuple[int, int]
    width: int
    device: str
    pieces: dict[str, float] = field(repr=False)
    checks: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, topology: Topology) -> float:
        """The sum over a topology's pieces. Raises InputError for one with a piece that was not measured."""
        try:
            return sum(self.pieces[key] * count for key, count in keys(topology))
        except KeyError as error:
            raise InputError(
                f"latency: {error.args[0]} of {topology} was not measured; is it of another space?"
            ) from None

    @property
    def error(self) -> float:
        """Mean of |sum - whole| / whole over the checked networks."""
        return statistics.fmean(abs(total - whole) / whole for total, whole in self.checks)

    @property
    def bias(self) -> float:
        """Mean of (sum - whole) / whole over the checked networks: above 0 where sums are too large."""
        return statistics.fmean((total - whole) / whole for total, whole in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The content of latency.json."""
        return {**vars(self), "img_size": list(self.img_size), "checks": [list(pair) for pair in self.checks]}


def latency_model(
    space: SearchSpace,
    width: int,
    img_size: ImageSize,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    path: Path | None = None,
) -> LatencyModel:
    """Time all pieces of the networks of a space, or read what ``path`` has of an earlier start.

    Raises InputError where ``path`` holds measurements of another batch, image size, width or device.
    """
    where = resolve_device(device)
    sides = image_sides(img_size)
    same: _Conditions = {"batch_size": batch_size, "img_size": sides, "width": width, "device": str(where)}
    if path is not None and path.exists():
        return _read(path, same)
    pieces: dict[str, float] = {}
    for topology in _covering(space, width):
        if {key for key, _ in keys(topology)} - set(pieces):
            measured = _measure(topology, sides, batch_size, where)
            pieces |= {key: min(value, pieces.get(key, value)) for key, value in measured.items()}
    model = LatencyModel(**same, pieces=pieces)
    generator = torch.Generator().manual_seed(0)
    for _ in range(CHECKED):
        topology = space.sample(generator, width)
        model.checks.append((model(topology), _whole(topology, model.img_size, batch_size, where)))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(model.to_dict(), indent=1) + "\n")
    return model


def keys(topology: Topology) -> Iterator[tuple[str, int]]:
    """The pieces of a network and how often each occurs."""
    yield f"embed kernel {topology.stages[0].kernel}", 1
    for number, stage in enumerate(topology.stages, start=1):
        if number > 1:
            yield f"merge {number} kernel {stage.kernel}", 1
        yield f"block {number} splits {stage.splits} expansion {stage.expansion} heads {topology.heads}", stage.depth
    yield "head", 1


def _covering(space: SearchSpace, width: int) -> Iterator[Topology]:
    """Topologies that together have every piece of the space's: all stages change at a time."""
    dimensions = space.dimensions
    stages = [
        [StageSpec(kernel, splits, expansion) for kernel, splits, expansion in _combinations(dimensions, number)]
        for number in range(1, NUM_STAGES + 1)
    ]
    for heads in dimensions["heads"]:
        for turn in range(max(map(len, stages))):
            yield Topology(tuple(own[turn % len(own)] for own in stages), heads, width)  # type: ignore[arg-type]


def _combinations(dimensions: dict[str, tuple[int, ...]], number: int) -> Iterator[tuple[int, int, int]]:
    """Every splits with every expansion, and every kernel once or more."""
    kernels, splits = dimensions[f"K{number}"], dimensions.get(f"S{number}", (1,))
    pairs = [(split, expansion) for split in splits for expansion in dimensions[f"E{number}"]]
    for turn in range(max(len(pairs), len(kernels))):
        yield kernels[turn % len(kernels)], *pairs[turn % len(pairs)]


def _network(topology: Topology, sides: tuple[int, int], device: torch.device) -> AsViT:
    return create_model(topology, img_size=sides, pos_embed="absolute").to(device).eval()


def _images(sides: tuple[int, int], batch_size: int, device: torch.device) -> Tensor:
    return torch.randn(batch_size, 3, *sides, device=device)  # [B, 3, H, W]


def _measure(topology: Topology, sides: tuple[int, int], batch_size: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of every piece of a network, each behind those before it: in a loop of its own, a piece would find
    its weights in the processor's cache. The shortest of several runs, as what else the machine does makes them longer.
    """
    network, images = _network(topology, sides, device), _images(sides, batch_size, device)
    pieces = list(zip([key for key, _ in keys(topology)], _pieces(network), strict=True))
    shortest: dict[str, float] = {}
    with torch.inference_mode():
        for turn in range(WARM_UP + RUNS):
            x = images
            for key, piece in pieces:
                synchronize(device)
                start = time.perf_counter()
                x = piece(x)
                synchronize(device)
                if turn >= WARM_UP:
                    passed = 1e3 * (time.perf_counter() - start)
                    shortest[key] = min(passed, shortest.get(key, passed))
    return shortest


def _pieces(network: AsViT) -> Iterator[Callable[[Tensor], Tensor]]:
    """The parts of a network of depths 1 in the order of ``keys``."""
    yield network.embed
    for number, stage in enumerate(network.stages):
        if number:
            yield stage.get_submodule("downsample")
        yield stage.get_submodule("blocks")
    yield nn.Sequential(network.norm, network.head)


def _whole(topology: Topology, sides: tuple[int, int], batch_size: int, device: torch.device) -> float:
    """Milliseconds of a whole network, the shortest of several runs."""
    network, images = _network(topology, sides, device), _images(sides, batch_size, device)
    times = []
    with torch.inference_mode():
        for _ in range(WARM_UP + RUNS):
            synchronize(device)
            start = time.perf_counter()
            network(images)
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    return min(times[WARM_UP:])


def _read(path: Path, same: Mapping[str, object]) -> LatencyModel:
    try:
        stored = from_json(path.read_bytes())
        stored["img_size"] = tuple(stored["img_size"])
        model = LatencyModel(**{**stored, "checks": [(float(a), float(b)) for a, b in stored["checks"]]})
        own = {name: getattr(model, name) for name in same}
    except (InputError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read as measured latencies ({error}); delete it to measure anew") from None
    if own != same:
        differences = ", ".join(
            f"{name} is {own[name]} there and {same[name]} here" for name in same if own[name] != same[name]
        )
        raise InputError(f"{path} was measured otherwise: {differences}; choose another run directory")
    return model
