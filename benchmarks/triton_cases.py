"""Compilations of the Triton kernels: the launches of ops on the shapes of real networks.

An op that gets Triton kernels is an entry of OPS: its shapes, and a function that calls it, forward and backward. Which
kernels it starts, and with what, is recorded from the launches themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from kernel_inspection import Launch, recorded_launches
from rooflines import Work

from asvit_fast import backends, ops
from asvit_fast.bench.workloads import DTYPES, AttentionWorkload
from asvit_fast.kernels import tile_table

Shape = Mapping[str, int]


def label_of(shape: Shape) -> str:
    """As `--shape` takes it: "N=49 d=8"."""
    return " ".join(f"{name}={value}" for name, value in shape.items())


@dataclass(frozen=True)
class Op:
    """An op with Triton kernels."""

    name: str
    shapes: tuple[Shape, ...]
    call: Callable[[Shape, str], object]  # of a shape and a dtype, with tensors of the CPU


@dataclass(frozen=True)
class Case:
    """One compilation."""

    launch: Launch
    shape: Shape
    dtype: str
    arch: int

    @property
    def kernel(self) -> str:
        return self.launch.name.removesuffix("_kernel")

    @property
    def label(self) -> str:
        return label_of(self.shape)

    def work(self) -> Work:
        """The work of a round of its loop: scores for attention, else bytes, as many as its instructions move."""
        if self.kernel not in ATTENTION:
            return Work("byte", 0.0)
        products, tensors = ATTENTION[self.kernel]
        tokens, head_dim = self.shape["N"], self.shape["d"]
        rows, columns = self.launch.constants["BLOCK_M"], self.launch.constants["BLOCK_N"]
        return Work(
            "score",
            min(rows, tokens) * min(columns, self.shape.get("keys", tokens)),
            exponentials=1.0,
            operations=2.0 * products * head_dim * (3 if self.dtype == "fp32" else 1),  # three TF32 products are one
            bytes=tensors * head_dim * DTYPES[self.dtype].itemsize / tokens,
        )


# --------------------------------------------------------------------------- ops

# kernels of windowed attention: matrix products per score, and tensors [tokens, head_dim] that are read and written
ATTENTION = {
    "window_attention_single_tile": (2, 4),
    "window_attention_single_tile_backward": (5, 7),
    "window_attention_tiled": (2, 4),
    "window_attention_tiled_backward": (5, 8),
    "window_attention_bias_gradient": (2, 4),
}
PAPER = [  # windows and heads of As-ViT's topologies (arXiv 2202.11921, Table 4), without bias or shift
    {"N": tokens, "d": head_dim, "bias": 0} for tokens in (49, 196, 784) for head_dim in (4, 8, 16, 22, 29, 32, 45, 64)
]
# Swin, S3 and V2 with bias, and half of the blocks shifted
SWIN = [{"N": tokens, "d": 32, "bias": 1} for tokens in (49, 64, 144, 196, 256)]
# Swin UNETR and Video Swin, three axes; HAT's overlapping cross-attention
WINDOWS = {98: (2, 7, 7), 343: (7, 7, 7), 392: (8, 7, 7)}
VOLUMES = [{"N": 343, "d": 16, "bias": 1}, *({"N": tokens, "d": 32, "bias": 1} for tokens in (98, 392))]
OVERLAPS = [{"N": 256, "keys": 576, "d": 30, "bias": 1}]
GELU = [
    {"orders": orders, "tanh": tanh, "bias": bias}
    for orders, tanh, bias in itertools.product((0, 1, 2), (0, 1), (0, 1))
]
EMBEDS = [{"K": 8, "C": channels} for channels in (32, 88, 116, 180)] + [{"K": 4, "C": c} for c in (96, 128)]
MERGES = [{"K": 4, "C": channels} for channels in (32, 88, 116, 180)] + [{"K": 2, "C": c} for c in (96, 128)]


def window_attention(shape: Shape, dtype: str) -> object:
    """A square window of N tokens, or one of WINDOWS, heads of d channels; with a bias the map is shifted, too."""
    window = WINDOWS.get(shape["N"]) or (math.isqrt(shape["N"]),) * 2
    keys = (math.isqrt(shape["keys"]),) * 2 if "keys" in shape else ()
    workload = AttentionWorkload(window, shape["d"], biased=bool(shape["bias"]), kv_window=keys, dtype=dtype)
    return workload.prepare("backward", 1, torch.device("cpu"))()


def gelu_taylor(shape: Shape, dtype: str) -> object:
    """Rows of orders 0 to `orders`, [orders + 1, 3136 tokens, 128 channels]."""
    x = torch.zeros(shape["orders"] + 1, 3136, 128, dtype=DTYPES[dtype])
    bias = torch.zeros(128, dtype=DTYPES[dtype]) if shape["bias"] else None
    return ops.gelu_taylor(x, "tanh" if shape["tanh"] else "none", bias)


def square_taylor(shape: Shape, dtype: str) -> object:
    """Rows of orders 0 to `orders`, [orders + 1, 3136 tokens, 128 channels]."""
    return ops.square_taylor(torch.zeros(shape["orders"] + 1, 3136, 128, dtype=DTYPES[dtype]))


def patch_embed(shape: Shape, dtype: str) -> object:
    """K x K pixels with stride 4, C channels, LayerNorm; forward and backward."""
    kernel, channels, pad = shape["K"], shape["C"], (shape["K"] - 4) // 2
    image, weight, bias = _leaves(dtype, (1, 3, 64, 64), (channels, 3, kernel, kernel), (channels,))
    norm = _leaves(dtype, (channels,), (channels,))
    return ops.patch_embed(image, weight, bias, 4, 1, (pad, pad, pad, pad), *norm).sum().backward()


def patch_merge(shape: Shape, dtype: str) -> object:
    """K x K tokens with stride 2 and twice the channels, LayerNorm; forward and backward."""
    channels, features = shape["C"], shape["K"] ** 2 * shape["C"]
    x, weight = _leaves(dtype, (1, 16, 16, channels), (2 * channels, features))
    norm = _leaves(dtype, (features,), (features,))
    return ops.patch_merge(x, weight, shape["K"], 2, *norm).sum().backward()


def position_bias(shape: Shape, dtype: str) -> object:
    """Of a square window of N tokens and 3 heads; forward and backward."""
    (table,) = _leaves(dtype, ((2 * math.isqrt(shape["N"]) - 1) ** 2, 3))
    return ops.position_bias(table, torch.zeros(shape["N"], shape["N"], dtype=torch.int64)).sum().backward()


def _leaves(dtype: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=DTYPES[dtype], requires_grad=True) for shape in shapes]


OPS = (
    Op("window_attention", (*PAPER, *SWIN, *VOLUMES, *OVERLAPS), window_attention),
    Op("gelu_taylor", tuple(GELU), gelu_taylor),
    Op("square_taylor", tuple({"orders": orders} for orders in (0, 1, 2)), square_taylor),
    Op("patch_embed", tuple(EMBEDS), patch_embed),
    Op("patch_merge", tuple(MERGES), patch_merge),
    Op("position_bias", tuple({"N": shape["N"]} for shape in SWIN), position_bias),
)


# --------------------------------------------------------------------------- launches


@contextmanager
def triton_not_started() -> Iterator[None]:
    """Ops do for tensors of the CPU all that the host does for a Triton kernel, but do not launch it."""
    run, triton.JITFunction.run = triton.JITFunction.run, lambda *_, **__: None
    try:
        with _triton_on_cpu():
            yield
    finally:
        triton.JITFunction.run = run


@contextmanager
def _triton_on_cpu() -> Iterator[None]:
    """Ops take their Triton kernels for tensors of the CPU, as they do in Triton's interpreter."""
    interpreted, backends._interpreted = backends._interpreted, lambda: True
    backends._reason.cache_clear()
    try:
        with backends.use_backend("triton"):
            yield
    finally:
        backends._interpreted = interpreted
        backends._reason.cache_clear()


def launches_of(call: Callable[[], object], arch: int) -> list[Launch]:
    """Launches of a call of ops on a GPU of that architecture, each once."""
    family = tile_table.FAMILIES[str(arch)]
    with _triton_on_cpu(), tile_table.assuming(family), recorded_launches() as launches:
        call()
    return [launch for number, launch in enumerate(launches) if launch not in launches[:number]]


def cases(archs: list[int], dtypes: list[str], shapes: Callable[[str], bool] = lambda label: True) -> Iterator[Case]:
    """Every kernel that an op starts on a shape; `shapes` chooses by label. Ops without Triton kernels start none."""
    for op, dtype, arch in itertools.product(OPS, dtypes, archs):
        for shape in op.shapes:
            if "triton" not in backends.declared().get(op.name, ()) or not shapes(label_of(shape)):
                continue
            launches = launches_of(functools.partial(op.call, shape, dtype), arch)
            yield from (Case(launch, shape, dtype, arch) for launch in launches)
