"""Scores of one network, and their statistics over freshly drawn networks."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..backends import computing_device, notify_once
from ..errors import InputError, first_line, one_line
from ..images import fingerprint, load_images
from ..memory import is_out_of_memory
from ..models import AsViT
from ..models.library import check_known
from ..nn import OverlapPatchEmbed, PatchMerging
from ..settings import ImageSize, ScoreSettings, check_seed
from ..topology import Topology
from .cuda_graphs import GRAPHS
from .curve import curve, radius, theta_grid
from .draws import (
    DRAWS,
    Seed,
    Target,
    circle_of,
    draw,
    drawing_from,
    placement,
    root_of,
    standard_normal_images,
    stream,
)
from .ntk import ntk_condition, ntk_gram_of, score_features
from .parallel import map_in_threads, worker_count
from .percentile import percentile
from .result import CURVE_METRICS, Measure, Score
from .stacked_score import MOST_TOGETHER, score_stacked

Network = TypeVar("Network", bound=nn.Module)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

Task = tuple[tuple[Target, int, Seed], tuple[str, ...]]  # (network, repeat, seed), metrics


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
            with any number of threads: networks share the threads, each computes with one. On a GPU the networks of a
            topology are run together, and their number shows in the rounding. torch's own generator is left as it was.

    Returns:
        A mapping: ``score(...)["length_distortion"].mean``, ``.std``, ``.seconds``, ``.values``, ``.percentile``.

    Raises:
        InputError: a value that cannot be used, naming it.
        TaylorError: a network that cannot be propagated, naming the function.

    Examples:
        >>> import asvit_fast as af
        >>> scores = af.score("4,2,2|2,1,2|3,1,2|2,1,2|8", img_size=32, repeats=2, batch=4)
        >>> sorted(scores)
        ['curvature', 'length_distortion', 'ntk_condition']
        >>> scores["length_distortion"].mean > 0
        True
    """
    settings = ScoreSettings(metrics, img_size, thetas, repeats, batch, convention, norms, device)
    check_seed(seed)
    target = parse_target(target)
    where = computing_device(device)
    pixels = load(images, settings)
    if isinstance(target, nn.Module):
        if any(parameter.is_meta for parameter in target.parameters()):
            raise InputError("the network's weights are on the meta device, without numbers: make it on a real one")
        where = placement(target)[0] if device is None else where
        results = _score_module(target, settings, pixels, where, seed)
    else:
        results = score_networks([(target, r, seed) for r in range(repeats)], settings, pixels, where)
    measures = {}
    for name in settings.metrics:
        repeated = [result[name] for result in results if name in result]
        seconds = statistics.fmean(one["seconds"] for one in repeated)
        measure = Measure(tuple(one["value"] for one in repeated), seconds)
        among = percentile(name, measure.mean, target, settings, noise=pixels is None)
        measures[name] = replace(measure, percentile=among)
    source = None if pixels is None else fingerprint(pixels) if isinstance(images, Tensor) else str(images)
    return Score(_describe(target), replace(settings, device=where), measures, seed, source)


def score_networks(
    networks: Sequence[tuple[Target, int, Seed]], settings: ScoreSettings, images: Tensor | None, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """``score_repeat`` of each (target, repeat, seed): side by side on a CPU, those of a topology together on a GPU."""
    if stacks_networks(device):
        return _score_in_stacks(networks, settings, images, device)
    return _score_side_by_side(networks, settings, images, device)


def stacks_networks(device: torch.device) -> bool:
    """Whether networks of one topology are run as one there. A CPU has enough to do with one network."""
    return device.type == "cuda" and not torch.is_autocast_enabled("cuda")


def _score_in_stacks(
    networks: Sequence[tuple[Target, int, Seed]], settings: ScoreSettings, images: Tensor | None, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """Networks of other kinds one by one; those of a topology too if they do not fit into memory together."""
    results: dict[int, dict[str, dict[str, float]]] = {}
    stacks: dict[tuple[Topology, int], list[int]] = defaultdict(list)  # places by topology and root seed
    for place, (target, _, seed) in enumerate(networks):
        parsed = parse_target(target)
        if isinstance(parsed, Topology):
            stacks[parsed, root_of(seed)].append(place)
        else:
            results[place] = _score_side_by_side([networks[place]], settings, images, device)[0]
    for (topology, _), places in stacks.items():
        for start in range(0, len(places), MOST_TOGETHER):
            part = places[start : start + MOST_TOGETHER]
            try:
                done = score_stacked(topology, [networks[place][1:] for place in part], settings, images, device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                results |= zip(part, done, strict=True)
                continue
            # outside the handler, so that the failed attempt's tensors are free
            GRAPHS.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            notify_once(
                ("memory", "networks"), f"asvit_fast: networks are scored one by one, memory ran out ({reason})"
            )
            alone = _score_side_by_side([networks[place] for place in part], settings, images, device)
            results |= zip(part, alone, strict=True)
    return [results[place] for place in range(len(networks))]


def _score_side_by_side(
    networks: Sequence[tuple[Target, int, Seed]], settings: ScoreSettings, images: Tensor | None, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """Networks left over when every worker has had its share are done in two parts, the NTK and the curve."""
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
    model = draw(target, repeat, settings, seed)
    device = placement(model)[0]
    draws = partial(drawing_from, stream(root_of(seed), DRAWS, repeat), device) if own_generator else nullcontext
    results: dict[str, dict[str, float]] = {}
    count = settings.batch
    try:
        if "ntk_condition" in settings.metrics:
            started = time.perf_counter()
            if images is None:
                images = standard_normal_images((settings.batch, *settings.image_shape), root_of(seed)).clone()
            pixels = images[: settings.batch].to(*placement(model))  # [batch, 3, H, W]
            with draws():
                value = ntk_condition(ntk_gram_of(model, pixels))
            results["ntk_condition"] = {"value": value, "seconds": time.perf_counter() - started}
        curve_metrics = [name for name in settings.metrics if name in CURVE_METRICS]
        if curve_metrics:
            count = settings.thetas
            started = time.perf_counter()
            with draws():
                values = _curve_values(model, curve_metrics, repeat, settings, root_of(seed))
            passed = time.perf_counter() - started
            results |= {name: {"value": value, "seconds": passed} for name, value in values.items()}
    except AssertionError as error:  # how timm refuses an image size
        size = " x ".join(map(str, settings.image_shape))
        raise InputError(f"{_describe(target)} does not take {count} images of {size}: {one_line(error)}") from error
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
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a tensor, a folder or None, got {type(images).__name__}")
    if images.dim() != 4 or tuple(images.shape[1:]) != settings.image_shape or len(images) < settings.batch:
        wanted = [f"{settings.batch} or more", *settings.image_shape]
        raise InputError(f"images must be {wanted}, got {list(images.shape)}; see batch and img_size")
    wrong = [number for number, image in enumerate(images[: settings.batch]) if not image.isfinite().all()]
    if wrong:
        raise InputError(f"images must be finite, number {wrong[0]} of {settings.batch} is not")
    return images[: settings.batch]


def without_norms(model: Network) -> Network:
    """A copy that shares the weights and has no normalisation layers (As-ViT measures the curve so)."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    bare = copy.deepcopy(model, shared)
    for module in list(bare.modules()):
        for name, child in list(module._modules.items()):  # one norm may have several names
            if isinstance(child, NORMS):
                ours = isinstance(module, (OverlapPatchEmbed, PatchMerging))
                setattr(module, name, None if ours else _without_norm(child))
    return bare


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a layer: timm's hold dropout and activation, in this order, too."""
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _curve_values(
    model: nn.Module, metrics: list[str], repeat: int, settings: ScoreSettings, root: int
) -> dict[str, float]:
    bare = settings.norms == "identity" or (settings.norms == "auto" and isinstance(model, AsViT))
    network = without_norms(model) if bare else model
    u0, u1 = (u.to(*placement(model)) for u in circle_of(settings.image_shape, root, repeat))
    scale = radius(settings.image_shape, settings.convention)
    theta = theta_grid(settings.thetas, settings.convention)
    order = 1 if metrics == ["length_distortion"] else 2
    with torch.no_grad():
        c = curve(score_features(network), theta, u0, u1, scale, order)
    return {name: CURVE_METRICS[name](c, settings.convention) for name in metrics}


def _describe(target: Topology | nn.Module | str) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else str(target)
