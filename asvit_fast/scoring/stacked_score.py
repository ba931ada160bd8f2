"""Scores of several networks of one topology at once, for a GPU: a few large kernels in place of many small ones."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import ScoreSettings
from ..topology import Topology
from .cuda_graphs import GRAPHS
from .curve import Curve, circle_mix, radius, theta_grid
from .draws import Seed, circle_of, root_of, standard_normal_images
from .ntk import ntk_condition
from .result import CURVE_METRICS
from .stacked_kernels import StackedKernels
from .stacked_networks import StackedCurves
from .stacked_weights import StackedWeights, stack_weights

MOST_TOGETHER = 8  # networks: a GPU is full, and activations take memory

Results = list[dict[str, dict[str, float]]]


def score_stacked(
    topology: Topology,
    networks: Sequence[tuple[int, Seed]],
    settings: ScoreSettings,
    images: Tensor | None,
    device: torch.device,
) -> Results:
    """``score_repeat`` of the networks (repeat, seed) of a topology, of one root seed: the same numbers to rounding."""
    weights = stack_weights(topology, networks, settings, pinned=device.type == "cuda")
    weights = weights.at(weights.flat.to(device, non_blocking=True))  # one copy for both passes
    root = root_of(networks[0][1])
    results: Results = [{} for _ in networks]
    if "ntk_condition" in settings.metrics:
        started = time.perf_counter()
        grams = _grams(topology, weights, settings, images, root, device)
        values = [ntk_condition(gram) for gram in grams]
        _note(results, "ntk_condition", values, started)
    curve_metrics = [name for name in settings.metrics if name in CURVE_METRICS]
    if curve_metrics:
        started = time.perf_counter()
        order = 1 if curve_metrics == ["length_distortion"] else 2
        curves = _curves(topology, weights, [repeat for repeat, _ in networks], settings, order, root, device)
        values_of = {name: [CURVE_METRICS[name](c, settings.convention) for c in curves] for name in curve_metrics}
        for name, values in values_of.items():
            _note(results, name, values, started)
    return [{name: result[name] for name in settings.metrics} for result in results]


def _note(results: Results, name: str, values: Sequence[float], started: float) -> None:
    """One value of each network; the time is shared out."""
    seconds = (time.perf_counter() - started) / len(results)
    for result, value in zip(results, values, strict=True):
        result[name] = {"value": value, "seconds": seconds}


def _grams(
    topology: Topology,
    weights: StackedWeights,
    settings: ScoreSettings,
    images: Tensor | None,
    root: int,
    device: torch.device,
) -> Tensor:
    """[networks, B, B], float64, in main memory."""
    if images is None:
        images = _noise((settings.batch, *settings.image_shape), root, device)
    pixels = images[: settings.batch].to(weights.flat.dtype)  # [B, channels, H, W]

    def run(flat: Tensor, pixels: Tensor) -> Tensor:
        return StackedKernels(topology, weights.at(flat)).grams(pixels)

    key = (topology, weights.neutral)
    return GRAPHS.run("the NTK", key, run, [weights.flat, pixels], device)


def _curves(
    topology: Topology,
    weights: StackedWeights,
    repeats: Sequence[int],
    settings: ScoreSettings,
    order: int,
    root: int,
    device: torch.device,
) -> list[Curve]:
    """One of each network, in main memory."""
    theta = theta_grid(settings.thetas, settings.convention)
    mix = circle_mix(theta, radius(settings.image_shape, settings.convention), order, weights.flat.dtype)
    mix = F.pad(mix, (0, 1))  # [order + 1, n, 3]
    mix[0, :, 2] = 1.0  # of what does not move
    circles = _circles(settings.image_shape, root, tuple(repeats), weights.flat.dtype, device)
    norms = settings.norms == "keep"

    def run(flat: Tensor, circles: Tensor, mix: Tensor) -> Tensor:
        return StackedCurves(topology, weights.at(flat), norms).features(circles, mix)

    key = (topology, weights.neutral, norms)
    features = GRAPHS.run("the curve", key, run, [weights.flat, circles, mix], device)  # [order + 1, n, networks, F]
    return [Curve(theta, *of_network) for of_network in features.unbind(2)]


@functools.lru_cache(maxsize=2)  # as those of one network in main memory: the same for all topologies of a search
def _circles(
    shape: tuple[int, ...], root: int, repeats: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[networks, 2, *shape]: u0 and u1."""
    return torch.stack([torch.stack(circle_of(shape, root, repeat)) for repeat in repeats]).to(device, dtype)


@functools.lru_cache(maxsize=1)
def _noise(shape: tuple[int, ...], root: int, device: torch.device) -> Tensor:
    return standard_normal_images(shape, root).to(device)
