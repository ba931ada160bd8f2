"""Costs of a network: parameters, FLOPs, measured latency and memory.

FLOPs are multiply-adds (MACs) of one image, as in the tables of the paper (As-ViT, arXiv 2202.11921).
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._extension import memory_of_torch
from .backends import resolve_device
from .errors import InputError
from .modes import evaluation_mode, restored_attributes
from .ops.flops import window_pairs
from .settings import MIN_IMG_SIZE, POS_EMBEDS, ImageSize, check_choice, image_sides
from .topology import EMBED_STRIDE, Topology


@dataclass(frozen=True)
class Cost:
    """``params``: parameters; ``flops``: multiply-adds of one image; ``latency_ms``: milliseconds of a forward pass,
    where somebody has measured them."""

    params: int
    flops: int
    latency_ms: float | None = None


def params(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: ImageSize = 224) -> int:
    """Multiply-adds of one image [C, H, W] through ``model``: matrix products and convolutions, nothing is computed.

    Counted on the meta device in evaluation mode. Window attention counts the real tokens of every window, not the
    padding, whichever implementation runs. The model is left as it was.
    """
    height, width = image_sides(img_size, MIN_IMG_SIZE)
    return count_macs_of_call(model, torch.empty(1, _channels(model), height, width, device="meta"))  # [1, C, H, W]


def count_macs_of_call(model: nn.Module, *inputs: Any, **named: Any) -> int:
    """Multiply-adds of ``model(*inputs, **named)``, counted as ``count_macs`` does; numbers get the model's type."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    reference = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), None)
    dtype = torch.get_default_dtype() if reference is None else reference.dtype

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to("meta", dtype if value.is_floating_point() else value.dtype)

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluation_mode(model), restored_attributes(model), counter:
        torch.func.functional_call(
            model, on_meta, tuple(map(moved, inputs)), {name: moved(value) for name, value in named.items()}
        )
    return counter.get_total_flops() // 2  # the counter takes a multiply-add as two operations


def topology_cost(
    topology: Topology, img_size: ImageSize = 224, num_classes: int = 1000, pos_embed: str = "none"
) -> Cost:
    """Cost of ``create_model(topology, img_size, num_classes, pos_embed)`` in closed form, in microseconds.

    Equals ``params`` and ``count_macs`` of that model exactly. Raises InputError for a size or embedding that no model
    has.
    """
    check_choice("pos_embed", pos_embed, POS_EMBEDS)
    return _topology_cost(topology, image_sides(img_size, MIN_IMG_SIZE), num_classes, pos_embed == "absolute")


@functools.lru_cache(maxsize=1 << 16)
def _topology_cost(topology: Topology, sides: tuple[int, int], num_classes: int, pos_embed: bool) -> Cost:
    dims, stage_heads = topology.dims, topology.stage_heads
    grid = (-(-sides[0] // EMBED_STRIDE), -(-sides[1] // EMBED_STRIDE))
    patch = 3 * topology.stages[0].kernel ** 2
    total_params = dims[0] * (patch + 1) + 2 * dims[0]  # convolution with bias, LayerNorm
    total_flops = grid[0] * grid[1] * patch * dims[0]
    if pos_embed:
        total_params += grid[0] * grid[1] * dims[0]
    for index, (stage, dim, heads) in enumerate(zip(topology.stages, dims, stage_heads, strict=True)):
        if index:
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            merged = stage.kernel**2 * dims[index - 1]
            total_params += merged * dim + 2 * merged  # Linear without bias, LayerNorm
            total_flops += grid[0] * grid[1] * merged * dim
        inner = dim // heads * heads  # narrower than dim when the heads do not divide it
        hidden = dim * stage.expansion
        windows = (-(-grid[0] // stage.splits), -(-grid[1] // stage.splits))
        weights = 4 * dim * inner + 2 * dim * hidden  # qkv and proj, the two layers of the MLP
        biases_and_norms = (3 * inner + dim) + (hidden + dim) + 4 * dim
        total_params += stage.depth * (weights + biases_and_norms)
        total_flops += stage.depth * (grid[0] * grid[1] * weights + 2 * inner * window_pairs(grid, windows))
    features = dims[-1]
    total_params += 2 * features + features * (features + 1) + num_classes * (features + 1)  # final norm, head
    total_flops += features * (features + num_classes)
    return Cost(total_params, total_flops)


def measure_latency(
    model: nn.Module, img_size: ImageSize = 224, batch: int = 1, device: str | torch.device = "cpu", runs: int = 20
) -> tuple[float, float]:
    """Median and interquartile range, in milliseconds, of ``runs`` forward passes of ``batch`` random images.

    In evaluation mode, after three passes that do not count; on a GPU every pass is waited for.
    """
    forward, device = _forward_pass(model, img_size, batch, device)
    with torch.inference_mode(), evaluation_mode(model):
        for _ in range(3):
            forward()
        milliseconds = []
        for _ in range(max(runs, 2)):
            synchronize(device)
            start = time.perf_counter()
            forward()
            synchronize(device)
            milliseconds.append(1e3 * (time.perf_counter() - start))
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return median, upper - lower


def measure_memory(
    model: nn.Module, img_size: ImageSize = 224, batch: int = 1, device: str | torch.device = "cuda"
) -> int:
    """Largest number of bytes that one forward pass of ``batch`` images allocates beyond weights and images.

    Read from the GPU's allocator, or on a CPU from torch's profiler of allocations.
    """
    forward, device = _forward_pass(model, img_size, batch, device)
    with torch.inference_mode(), evaluation_mode(model):
        forward()  # what is only made once (workspaces, caches) does not count
        return peak_allocation(forward, device)


def peak_allocation(run: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the worst moment of one call, beyond what was there before it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks otherwise
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with memory_of_torch(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def _forward_pass(
    model: nn.Module, img_size: ImageSize, batch: int, device: str | torch.device
) -> tuple[Callable[[], Any], torch.device]:
    height, width = image_sides(img_size, MIN_IMG_SIZE)
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    device = resolve_device(device)
    model = model.to(device)
    weight = next(model.parameters(), torch.empty(0))
    images = torch.randn(batch, _channels(model), height, width, device=device).to(weight.dtype)  # [B, C, H, W]
    return lambda: model(images), device


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _channels(model: nn.Module) -> int:
    """Channels of the images that the model takes, as timm's models say it."""
    return getattr(model, "in_chans", 3)
