"""Everything that a study measures of an untrained topology."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cost import topology_cost
from ..models import AsViT
from ..ops.flops import window_pairs
from ..scoring.draws import draw, standard_normal_images, stream
from ..scoring.score import score_networks
from ..settings import CONVENTIONS, METRICS, ScoreSettings, image_sides
from ..topology import EMBED_STRIDE, Topology
from .az_nas import az_nas_measures
from .saliency import saliency_measures

_SIGNS = 2**31 + 3  # key of the stream of random signs


@dataclass(frozen=True)
class MeasureKind:
    """A measure: whether larger (1) or smaller (-1) is said to be better, what it is, and who says so."""

    direction: int
    title: str
    source: str


AS_VIT, COST = "As-ViT, arXiv 2202.11921", "size"
KINDS = {
    "length_distortion": MeasureKind(1, "length distortion", AS_VIT),
    "ntk_condition": MeasureKind(-1, "NTK condition number", AS_VIT),
    "curvature": MeasureKind(-1, "curvature", AS_VIT),
    "gauss_length": MeasureKind(1, "length of the unit velocity", AS_VIT),
    "length_distortion_reference": MeasureKind(1, "length distortion, authors' code", AS_VIT),
    "ntk_condition_reference": MeasureKind(-1, "NTK condition number, authors' code", AS_VIT),
    "curvature_reference": MeasureKind(-1, "curvature, authors' code", AS_VIT),
    "gauss_length_reference": MeasureKind(1, "length of the unit velocity, authors' code", AS_VIT),
    "params": MeasureKind(1, "parameters", COST),
    "flops": MeasureKind(1, "multiply-adds", COST),
    "tokens": MeasureKind(1, "tokens of all blocks", COST),
    "attention_pairs": MeasureKind(1, "pairs of tokens in attention", COST),
    "synflow": MeasureKind(1, "synaptic flow", "arXiv 2006.05467"),
    "dss": MeasureKind(1, "DSS", "TF-TAS, arXiv 2203.12217"),
    "az_expressivity": MeasureKind(1, "AZ-NAS expressivity", "arXiv 2403.19232"),
    "az_progressivity": MeasureKind(1, "AZ-NAS progressivity", "arXiv 2403.19232"),
    "az_trainability": MeasureKind(1, "AZ-NAS trainability", "arXiv 2403.19232"),
}  # of one network; those of ranks among networks are in analysis.py
NAMES = tuple(KINDS)


def measure(topology: Topology, settings: ScoreSettings, images: Tensor | None, seed: int) -> dict[str, float]:
    """Every measure of ``KINDS`` and, as ``NAME.seconds``, the time that it took for one network.

    Scores are means over ``settings.repeats`` networks drawn from ``seed``, the other measures over the same ones. A
    curve measure has the time of the pass that it shares with the others of its convention. ``images`` [batch, 3, H,
    W] are those of the NTK; AZ-NAS sees standard normal ones, as its authors have it.
    """
    values: dict[str, float] = _size(topology, settings)
    for convention in CONVENTIONS:
        values |= _scores(topology, replace(settings, convention=convention, metrics=METRICS), images, seed)
    noise = standard_normal_images((settings.batch, *settings.image_shape), seed)  # [batch, 3, H, W]
    device = torch.device(settings.device or "cpu")
    signs = [stream(seed, _SIGNS, repeat) for repeat in range(settings.repeats)]

    def saliency(model: AsViT, repeat: int) -> dict[str, float]:
        return saliency_measures(model, settings.image_shape)

    def az_nas(model: AsViT, repeat: int) -> dict[str, float]:
        return az_nas_measures(model, noise.to(device), signs[repeat])

    for function in (saliency, az_nas):
        values |= _mean_of_networks(function, topology, settings, seed)
    return values


def _size(topology: Topology, settings: ScoreSettings) -> dict[str, float]:
    started = time.perf_counter()
    cost = topology_cost(topology, settings.img_size, pos_embed="absolute")
    tokens, pairs = token_counts(topology, image_sides(settings.img_size))
    values = {"params": cost.params, "flops": cost.flops, "tokens": tokens, "attention_pairs": pairs}
    return _timed({name: float(value) for name, value in values.items()}, time.perf_counter() - started)


def token_counts(topology: Topology, sides: tuple[int, int]) -> tuple[int, int]:
    """Tokens of all blocks, and pairs of tokens that attend to each other, of one image of ``sides`` pixels."""
    grid = (-(-sides[0] // EMBED_STRIDE), -(-sides[1] // EMBED_STRIDE))
    tokens = pairs = 0
    for index, stage in enumerate(topology.stages):
        if index:
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        windows = (-(-grid[0] // stage.splits), -(-grid[1] // stage.splits))
        tokens += stage.depth * grid[0] * grid[1]
        pairs += stage.depth * window_pairs(grid, windows)
    return tokens, pairs


def _scores(topology: Topology, settings: ScoreSettings, images: Tensor | None, seed: int) -> dict[str, float]:
    networks = [(topology, repeat, seed) for repeat in range(settings.repeats)]
    assert isinstance(settings.device, torch.device)
    results = score_networks(networks, settings, images, settings.device)
    suffix = "" if settings.convention == "paper" else f"_{settings.convention}"
    values = {}
    for metric in settings.metrics:
        values[metric + suffix] = _mean([result[metric]["value"] for result in results])
        values[f"{metric}{suffix}.seconds"] = _mean([result[metric]["seconds"] for result in results])
    return values


def _mean_of_networks(
    function: Callable[[AsViT, int], dict[str, float]], topology: Topology, settings: ScoreSettings, seed: int
) -> dict[str, float]:
    results, seconds = [], 0.0
    for repeat in range(settings.repeats):
        model = draw(topology, repeat, settings, seed)
        assert isinstance(model, AsViT)
        started = time.perf_counter()
        results.append(function(model, repeat))
        seconds += time.perf_counter() - started
    means = {name: _mean([result[name] for result in results]) for name in results[0]}
    return _timed(means, seconds / settings.repeats)


def _timed(values: dict[str, float], seconds: float) -> dict[str, float]:
    return {**values, **{f"{name}.seconds": seconds for name in values}}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values)
