"""Scores of one network, and their statistics over freshly drawn networks."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import computing_device
from ..errors import InputError
from ..models import AsViT, create_model
from ..nn import OverlapPatchEmbed, PatchMerging
from ..topology import Topology
from .curve import check_convention, circle, curve, theta_grid
from .measures import curvature, gauss_length, length_distortion
from .ntk import ntk_condition, ntk_gram, score_features
from .workers import side_by_side, worker_count

CURVE_METRICS = {"length_distortion": length_distortion, "curvature": curvature, "gauss_length": gauss_length}
METRICS = (*CURVE_METRICS, "ntk_condition")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)

Target = Topology | nn.Module | str
Seed = int | tuple[int, ...]

# What a random stream is for: streams of different purposes never coincide.
WEIGHTS, CONVOLUTION, CIRCLE, IMAGES = range(4)


@dataclass(frozen=True)
class ScoreSettings:
    """How to score.

    metrics: of "length_distortion", "curvature", "gauss_length", "ntk_condition". img_size: pixels, int or (height,
        width).
    thetas: points of the circle. repeats: networks drawn. batch: images of the NTK. convention: "paper" or "reference".
    norms: "auto" takes the norms out of our networks for the curve (as the authors do) and keeps those of any other;
    "identity" and "keep" do so for every network. device: None is CUDA if there is one.
    Raises InputError for a value that cannot be used.
    """

    metrics: tuple[str, ...] = ("length_distortion", "curvature", "ntk_condition")
    img_size: int | tuple[int, int] = 224
    thetas: int = 10
    repeats: int = 5
    batch: int = 16
    convention: str = "paper"
    norms: str = "auto"
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", tuple(self.metrics.split(",")))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise InputError(f"metrics must be some of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}")
        for name, low in (("thetas", 1), ("repeats", 1), ("batch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{name} must be an integer of {low} or more, got {value!r}")
        if self.norms not in ("auto", "identity", "keep"):
            raise InputError(f"norms must be 'auto', 'identity' or 'keep', got {self.norms!r}")
        check_convention(self.convention)
        if any(not isinstance(side, int) or side < 1 for side in self.image_shape):
            raise InputError(f"img_size must be pixels, one integer or (height, width), got {self.img_size!r}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        if len(size) != 2:
            raise InputError(f"img_size must be pixels, one integer or (height, width), got {self.img_size!r}")
        return (3, *size)


@dataclass(frozen=True)
class Measure:
    """One metric over the repeats; ``seconds`` is the time of one repeat (metrics of the same pass share it).

    Non-finite values stay what they are: they are reported, and rank worst.
    """

    values: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation; 0 for a single value, NaN when a value is not finite."""
        if len(self.values) == 1:
            return 0.0
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan


@dataclass(frozen=True)
class Score(Mapping[str, Measure]):
    """Metric name -> Measure, with what was scored and how."""

    target: str
    settings: ScoreSettings
    measures: dict[str, Measure]

    def __getitem__(self, metric: str) -> Measure:
        return self.measures[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        settings = {**asdict(self.settings), "metrics": list(self.settings.metrics)}
        settings["device"] = None if self.settings.device is None else str(self.settings.device)
        measures = {
            name: {"mean": m.mean, "std": m.std, "seconds": m.seconds, "values": list(m.values)}
            for name, m in self.measures.items()
        }
        return {"target": self.target, "settings": settings, "metrics": measures}


def score(
    target: Target,
    metrics: tuple[str, ...] = ScoreSettings.metrics,
    img_size: int | tuple[int, int] = 224,
    thetas: int = 10,
    repeats: int = 5,
    batch: int = 16,
    images: Tensor | str | Path | None = None,
    seed: int = 0,
    convention: str = "paper",
    device: str | torch.device | None = None,
    norms: str = "auto",
) -> Score:
    """Score a network without training it (As-ViT, arXiv 2202.11921, section 3.2).

    Args:
        target: a Topology (or its text) or a timm model name, drawn anew ``repeats`` times; or a Module, scored with
            the weights it has: its repeats differ in the circle, and its NTK is measured once.
        metrics, img_size, thetas, repeats, batch, convention, device, norms: see ScoreSettings.
        images: for the NTK: [batch or more, 3, H, W], a folder of images, or None for standard normal ones.
        seed: of weights, circles and images; the same seed gives the same scores.

    Returns:
        A mapping: ``score(...)["length_distortion"].mean``, ``.std``, ``.seconds``, ``.values``.

    Raises:
        InputError: a value that cannot be used, naming it.
        TaylorError: a network that cannot be propagated, naming the function.
    """
    settings = ScoreSettings(metrics, img_size, thetas, repeats, batch, convention, norms, device)
    target = parse_target(target)
    where = computing_device(device)
    pixels = load(images, settings)
    is_module = isinstance(target, nn.Module)
    if is_module:  # one network: its repeats take turns, and its NTK is measured once
        results = [score_repeat(target, r, settings, pixels, seed, skip_ntk=r > 0) for r in range(repeats)]
    else:
        results = score_networks([(target, r, seed) for r in range(repeats)], settings, pixels, where)
    measures = {name: _measure([result[name] for result in results if name in result]) for name in settings.metrics}
    return Score(_describe(target), settings, measures)


def _measure(results: list[dict[str, float]]) -> Measure:
    values = tuple(result["value"] for result in results)
    return Measure(values, statistics.fmean(result["seconds"] for result in results))


def score_networks(
    networks: Sequence[tuple[Target, int, Seed]],
    settings: ScoreSettings,
    images: Tensor | None,
    device: torch.device,
) -> list[dict[str, dict[str, float]]]:
    """``score_repeat`` of each (target, repeat, seed), side by side on a CPU.

    Networks left over when every worker has had its share are done in two parts, the NTK and the curve.
    """
    metrics = settings.metrics
    parts = [tuple(m for m in metrics if (m in CURVE_METRICS) is of_curve) for of_curve in (False, True)]
    workers = worker_count(len(networks) * len(parts), device)
    whole = len(networks) // workers * workers if workers > 1 and all(parts) else len(networks)
    tasks = [(network, metrics) for network in networks[:whole]]
    tasks += [(network, part) for network in networks[whole:] for part in parts]

    def work(task: tuple[tuple[Target, int, Seed], tuple[str, ...]]) -> dict[str, dict[str, float]]:
        (target, repeat, seed), wanted = task
        return score_repeat(target, repeat, replace(settings, metrics=wanted), images, seed)

    done = side_by_side(work, tasks, device)
    surplus = [ntk | of_curve for ntk, of_curve in zip(done[whole::2], done[whole + 1 :: 2], strict=True)]
    return done[:whole] + surplus


def score_repeat(
    target: Target,
    repeat: int,
    settings: ScoreSettings,
    images: Tensor | None = None,
    seed: Seed = 0,
    skip_ntk: bool = False,
) -> dict[str, dict[str, float]]:
    """Every metric of one network: {metric: {"value", "seconds"}}, a pure function of its arguments.

    Args:
        target: see ``score``; a Topology or name is drawn from ``seed`` and ``repeat``.
        repeat: number of the network; network k is scored on circle k.
        images: [batch or more, 3, H, W] for the NTK, or None for standard normal ones.
        seed: an integer, or a tuple whose first entry alone decides circles and images (so that candidates share them)
            while the whole tuple decides the weights.
    """
    target = parse_target(target)
    model = _draw(target, repeat, settings, seed)
    results: dict[str, dict[str, float]] = {}
    try:
        if "ntk_condition" in settings.metrics and not skip_ntk:
            started = time.perf_counter()
            value = ntk_condition(ntk_gram(model, _ntk_images(images, settings, _root(seed)).to(*_placement(model))))
            results["ntk_condition"] = {"value": value, "seconds": time.perf_counter() - started}
        curve_metrics = [name for name in settings.metrics if name in CURVE_METRICS]
        if curve_metrics:
            started = time.perf_counter()
            values = _curve_values(model, curve_metrics, repeat, settings, _root(seed))
            passed = time.perf_counter() - started
            results |= {name: {"value": value, "seconds": passed} for name, value in values.items()}
    except AssertionError as error:  # how timm refuses an image size
        raise InputError(f"{_describe(target)} does not take images of {settings.image_shape}: {error}") from error
    return {name: results[name] for name in settings.metrics if name in results}


def parse_target(target: Target) -> Topology | nn.Module | str:
    """A Topology for its text, a known timm name, or the module itself."""
    if isinstance(target, (Topology, nn.Module)):
        return target
    if not isinstance(target, str):
        raise InputError(f"score a Topology, a Module or a timm model name, got {type(target).__name__}")
    if "|" in target:
        return Topology.parse(target)
    import timm

    if not timm.is_model(target):
        close = ", ".join(timm.list_models(f"*{target.split('_')[0]}*")[:5])
        raise InputError(
            f"{target!r} is neither a topology nor a timm model{f'; did you mean {close}' if close else ''}"
        )
    return target


def load(images: Tensor | str | Path | None, settings: ScoreSettings) -> Tensor | None:
    """The NTK's images [batch, 3, H, W]: from a folder, a tensor, or None when standard normal ones are to be drawn."""
    if images is None or "ntk_condition" not in settings.metrics:
        return None
    if isinstance(images, (str, Path)):
        from ..images import load_images

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
        return copy.deepcopy(target).to(device) if moves else target
    key = (seed,) if isinstance(seed, int) else seed
    if isinstance(target, Topology):
        with torch.device("meta"):
            model = create_model(target, img_size=settings.image_shape[1:], num_classes=0, weight_init="skip")
        model = model.to_empty(device="cpu")
        model.init_weights(generator=stream(*key, WEIGHTS, repeat))
        if settings.convention == "reference":  # the authors' code draws the convolution once for all repeats
            model.init_convolution(stream(*key, CONVOLUTION))
        return model.eval().to(device)
    import timm

    fixed = timm.get_pretrained_cfg_value(target, "fixed_input_size") or target.startswith("asvit")
    options: dict[str, Any] = {"img_size": settings.image_shape[1:]} if fixed else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(*key, WEIGHTS, repeat).initial_seed())
        try:
            return timm.create_model(target, **options).eval().to(device)
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"timm cannot build {target!r} for images of {settings.image_shape}: {error}") from error


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's parameters."""
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


def _ntk_images(images: Tensor | None, settings: ScoreSettings, root: int) -> Tensor:
    if images is not None:
        return images[: settings.batch]
    return _standard_normal_images((settings.batch, *settings.image_shape), root).clone()


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
    was_training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            c = curve(score_features(network), theta, u0, u1, scale, order)
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return {name: CURVE_METRICS[name](c, settings.convention) for name in metrics}


def _describe(target: Topology | nn.Module | str) -> str:
    return type(target).__name__ if isinstance(target, nn.Module) else str(target)
