"""Scores of one network, and their statistics over freshly drawn networks."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import computing_device
from ..errors import InputError
from ..images import fingerprint, load_images
from ..models import AsViT, create_model
from ..models.library import check_known, create_by_name, takes_size
from ..nn import OverlapPatchEmbed, PatchMerging
from ..settings import ImageSize, ScoreSettings, check_seed
from ..topology import Topology
from .curve import circle, curve, theta_grid
from .ntk import ntk_condition, ntk_gram_of, score_features
from .parallel import map_in_threads, worker_count
from .replica import replica
from .result import CURVE_METRICS, Measure, Score

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)

Target = Topology | nn.Module | str
Seed = int | tuple[int, ...]
Task = tuple[tuple[Target, int, Seed], tuple[str, ...]]  # (network, repeat, seed), metrics

# What a random stream is for: streams of different purposes never coincide.
WEIGHTS, CONVOLUTION, CIRCLE, IMAGES, DRAWS = range(5)

_torch_generator = threading.Lock()  # held while weights are drawn from torch's own generator


def score(
    target: Target,
    metrics: tuple[str, ...] = ScoreSettings.metrics,
    img_size: ImageSize = ScoreSettings.img_size,
    thetas: int = ScoreSettings.thetas,
    repeats: int = ScoreSettings.repeats,
    batch: int = ScoreSettings.batch,
    images: Tensor | str | Path | None = None,
    seed: int = 0,
    convention: str = ScoreSettings.convention,
    device: str | torch.device | None = None,
    norms: str = ScoreSettings.norms,
) -> Score:
    """Score a network without training it (As-ViT, arXiv 2202.11921, section 3.2).

    Args:
        target: a Topology (or its text) or the name of a model of timm or torchvision, drawn anew ``repeats`` times; or
            a Module, scored with the weights it has: its repeats differ in the circle, and its NTK is measured once.
        metrics: of "length_distortion", "curvature", "gauss_length", "ntk_condition".
        img_size: pixels, int or (height, width). thetas: points of the circle. batch: images of the NTK.
        convention: "paper" or "reference". device: CUDA if there is one, by default.
        norms: "auto" takes the norms out of our networks for the curve (as the authors do) and keeps those of any
            other; "identity" and "keep" do so for every network.
        images: for the NTK: [batch or more, 3, H, W], a folder of images, or None for standard normal ones.
        seed: of weights, circles and images; the same seed gives the same scores to the bit on one kind of processor,
            with any number of threads: networks share the threads, each computes with one. torch's own generator is
            left as it was.

    Returns:
        A mapping: ``score(...)["length_distortion"].mean``, ``.std``, ``.seconds``, ``.values``.

    Raises:
        InputError: a value that cannot be used, naming it.
        TaylorError: a network that cannot be propagated, naming the function.
    """
    settings = ScoreSettings(metrics, img_size, thetas, repeats, batch, convention, norms, device)
    check_seed(seed)
    target = parse_target(target)
    where = computing_device(device)
    pixels = load(images, settings)
    if isinstance(target, nn.Module):
        where = _placement(target)[0] if device is None else where
        results = _score_module(target, settings, pixels, where, seed)
    else:
        results = score_networks([(target, r, seed) for r in range(repeats)], settings, pixels, where)
    measures = {}
    for name in settings.metrics:
        repeated = [result[name] for result in results if name in result]
        seconds = statistics.fmean(one["seconds"] for one in repeated)
        measures[name] = Measure(tuple(one["value"] for one in repeated), seconds)
    source = None if pixels is None else fingerprint(pixels) if isinstance(images, Tensor) else str(images)
    return Score(_describe(target), replace(settings, device=where), measures, seed, source)


def score_networks(
    networks: Sequence[tuple[Target, int, Seed]], settings: ScoreSettings, images: Tensor | None, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """``score_repeat`` of each (target, repeat, seed), side by side on a CPU.

    Networks left over when every worker has had its share are done in two parts, the NTK and the curve.
    """
    parts = _parts(settings.metrics)
    workers = worker_count(len(networks) * len(parts), device)
    whole = len(networks) // workers * workers if workers > 1 and len(parts) > 1 else len(networks)
    tasks = [(network, settings.metrics) for network in networks[:whole]]
    tasks += [(network, part) for network in networks[whole:] for part in parts]
    done = _score_tasks(tasks, settings, images, device)
    surplus = [ntk | of_curve for ntk, of_curve in zip(done[whole::2], done[whole + 1 :: 2], strict=True)]
    return done[:whole] + surplus


def _score_module(
    model: nn.Module, settings: ScoreSettings, images: Tensor | None, device: torch.device, seed: int
) -> list[dict[str, dict[str, float]]]:
    """The NTK of one network once, and its curves."""
    tasks: list[Task] = []
    for part in _parts(settings.metrics):
        times = 1 if part == ("ntk_condition",) else settings.repeats
        tasks += [((model, repeat, seed), part) for repeat in range(times)]
    return _score_tasks(tasks, settings, images, device)


def _parts(metrics: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The NTK's metric and the curve's, without empty parts."""
    parts = [tuple(m for m in metrics if (m in CURVE_METRICS) is of_curve) for of_curve in (False, True)]
    return [part for part in parts if part]


def _score_tasks(
    tasks: Sequence[Task], settings: ScoreSettings, images: Tensor | None, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """Networks that draw random numbers (few do) are found by torch's generator having moved, and done one by one."""

    def work(task: Task, own_generator: bool) -> dict[str, dict[str, float]]:
        (target, repeat, seed), wanted = task
        part = replace(settings, metrics=wanted)
        return score_repeat(target, repeat, part, images, seed, own_generator)

    together = worker_count(len(tasks), device) > 1
    before = torch.get_rng_state()
    done = map_in_threads(partial(work, own_generator=not together), tasks, device)
    if torch.equal(torch.get_rng_state(), before):
        return done
    torch.set_rng_state(before)
    return map_in_threads(partial(work, own_generator=True), tasks, device, most_workers=1)


def score_repeat(
    target: Target,
    repeat: int,
    settings: ScoreSettings,
    images: Tensor | None = None,
    seed: Seed = 0,
    own_generator: bool = True,
) -> dict[str, dict[str, float]]:
    """Every metric of one network: {metric: {"value", "seconds"}}, a pure function of its arguments.

    Args:
        target: see ``score``; a Topology or name is drawn from ``seed`` and ``repeat``.
        repeat: number of the network; network k is scored on circle k.
        images: [batch or more, 3, H, W] for the NTK, or None for standard normal ones.
        seed: an integer, or a tuple whose first entry alone decides circles and images (so that candidates share them)
            while the whole tuple decides the weights.
        own_generator: give random numbers that the network draws to its own seed, for which no other thread may draw
            any at the same time. torch's generator is then left as it was.
    """
    target = parse_target(target)
    model = _draw(target, repeat, settings, seed)
    device = _placement(model)[0]
    draws = partial(_drawing_from, stream(_root(seed), DRAWS, repeat), device) if own_generator else nullcontext
    results: dict[str, dict[str, float]] = {}
    try:
        if "ntk_condition" in settings.metrics:
            started = time.perf_counter()
            if images is None:
                images = _standard_normal_images((settings.batch, *settings.image_shape), _root(seed)).clone()
            pixels = images[: settings.batch].to(*_placement(model))  # [batch, 3, H, W]
            with draws():
                value = ntk_condition(ntk_gram_of(model, pixels))
            results["ntk_condition"] = {"value": value, "seconds": time.perf_counter() - started}
        curve_metrics = [name for name in settings.metrics if name in CURVE_METRICS]
        if curve_metrics:
            started = time.perf_counter()
            with draws():
                values = _curve_values(model, curve_metrics, repeat, settings, _root(seed))
            passed = time.perf_counter() - started
            results |= {name: {"value": value, "seconds": passed} for name, value in values.items()}
    except AssertionError as error:  # how timm refuses an image size
        raise InputError(f"{_describe(target)} does not take images of {settings.image_shape}: {error}") from error
    return {name: results[name] for name in settings.metrics if name in results}


def parse_target(target: Target) -> Topology | nn.Module | str:
    """A Topology for its text, a name that timm or torchvision knows, or the module itself."""
    if isinstance(target, (Topology, nn.Module)):
        return target
    if not isinstance(target, str):
        raise InputError(f"score a Topology, a Module or the name of a model, got {type(target).__name__}")
    if "|" in target:
        return Topology.parse(target)
    check_known(target)
    return target


def load(images: Tensor | str | Path | None, settings: ScoreSettings) -> Tensor | None:
    """The NTK's images [batch, 3, H, W]: from a folder, a tensor, or None when standard normal ones are to be drawn."""
    if images is None or "ntk_condition" not in settings.metrics:
        return None
    if isinstance(images, (str, Path)):
        return load_images(images, settings.batch, settings.image_shape[1:])
    if images.dim() != 4 or tuple(images.shape[1:]) != settings.image_shape or len(images) < settings.batch:
        wanted = [f"{settings.batch} or more", *settings.image_shape]
        raise InputError(f"images must be {wanted}, got {list(images.shape)}; see batch and img_size")
    return images[: settings.batch]


def stream(*key: int) -> torch.Generator:
    """A random generator that is a pure function of its key (non-negative integers)."""
    state = np.random.SeedSequence([int(part) for part in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def without_norms(model: nn.Module) -> nn.Module:
    """A copy that shares the weights and has no normalisation layers (As-ViT measures the curve so)."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    bare = copy.deepcopy(model, shared)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NORMS):
                ours = isinstance(module, (OverlapPatchEmbed, PatchMerging))
                setattr(module, name, None if ours else nn.Identity())
    return bare


def _root(seed: Seed) -> int:
    return seed if isinstance(seed, int) else seed[0]


def _draw(target: Topology | nn.Module | str, repeat: int, settings: ScoreSettings, seed: Seed) -> nn.Module:
    """Network number ``repeat``, on the device of the settings; a module stays on its own unless they name another."""
    device = computing_device(settings.device)
    if isinstance(target, nn.Module):
        moves = settings.device is not None and _placement(target)[0] != device
        return copy.deepcopy(target).eval().to(device) if moves else replica(target)
    key = (seed,) if isinstance(seed, int) else seed
    if isinstance(target, Topology):
        with torch.device("meta"):
            model = create_model(target, img_size=settings.image_shape[1:], num_classes=0, weight_init="skip")
        model = model.to_empty(device="cpu")
        model.init_weights(generator=stream(*key, WEIGHTS, repeat))
        if settings.convention == "reference":  # the authors' code draws the convolution once for all repeats
            model.init_convolution(stream(*key, CONVOLUTION))
        return model.eval().to(device)
    options: dict[str, Any] = {"img_size": settings.image_shape[1:]} if takes_size(target) else {}
    cpu = torch.device("cpu")
    with _torch_generator, cpu, _drawing_from(stream(*key, WEIGHTS, repeat), cpu):
        try:
            return create_by_name(target, **options).eval().to(device)
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot build {target!r} for images of {settings.image_shape}: {error}") from error


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """torch's generators, of the CPU and of ``device``, draw what ``generator``'s seed decides, and forget it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(generator.initial_seed())
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(generator.initial_seed())
        yield


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's parameters."""
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


@functools.lru_cache(maxsize=1)  # the same for all networks of a search, and slow to draw
def _standard_normal_images(shape: tuple[int, ...], root: int) -> Tensor:
    return torch.randn(shape, generator=stream(root, IMAGES))


@functools.lru_cache(maxsize=8)  # of the repeats, the same for all topologies of a search
def _circle(shape: tuple[int, ...], root: int, repeat: int) -> tuple[Tensor, Tensor]:
    return circle(shape, stream(root, CIRCLE, repeat))


def _curve_values(
    model: nn.Module, metrics: list[str], repeat: int, settings: ScoreSettings, root: int
) -> dict[str, float]:
    bare = settings.norms == "identity" or (settings.norms == "auto" and isinstance(model, AsViT))
    network = without_norms(model) if bare else model
    u0, u1 = (u.to(*_placement(model)) for u in _circle(settings.image_shape, root, repeat))
    scale = math.sqrt(u0.numel()) if settings.convention == "paper" else 1.0
    theta = theta_grid(settings.thetas, settings.convention)
    order = 1 if metrics == ["length_distortion"] else 2
    with torch.no_grad():
        c = curve(score_features(network), theta, u0, u1, scale, order)
    return {name: CURVE_METRICS[name](c, settings.convention) for name in metrics}


def _describe(target: Topology | nn.Module | str) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else str(target)
