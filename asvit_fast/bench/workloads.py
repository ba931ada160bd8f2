"""Calls of ops on the shapes of real networks, which `asvit-fast tune` and `asvit-fast bench op` time."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..nn.patch_embed import embed_patches
from ..ops.patch_embed import MAXIMUM_CHANNELS
from ..ops.window_attention import is_single_tile
from ..settings import DTYPES as DTYPE_NAMES
from ..settings import TUNED_OPS, ImageSize, image_sides
from ..topology import EMBED_STRIDE, NAMED_TOPOLOGIES, Topology

Tiles = dict[str, int]  # options of a launch, or features of a shape, by the names of a table's row
Run = Callable[[], list[Tensor]]
Draw = Callable[..., Tensor]

DTYPES: dict[str, torch.dtype] = {short: getattr(torch, name) for short, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of an op in one type of activations."""

    dtype: str = "bf16"

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return torch.finfo(DTYPES[self.dtype]).bits

    def _draw(self, device: torch.device) -> Draw:
        generator = torch.Generator(device).manual_seed(0)
        return lambda *shape: torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])


def _run(op: Callable[..., Tensor], inputs: Sequence[Tensor], fixed: Sequence[Tensor], backward: bool) -> Run:
    """``op(*fixed, *inputs)``, or the gradients of the inputs."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [op(*fixed, *inputs)]

    def both() -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = op(*fixed, *leaves)
            return list(torch.autograd.grad(out, leaves, gradient))

    if not backward:
        return forward
    gradient = torch.randn_like(forward()[0])
    return both


@dataclass(frozen=True)
class AttentionWorkload(_Call):
    """Windowed attention on a square map, or on one of three axes."""

    window: tuple[int, ...]
    head_dim: int
    heads: int = 4
    # tokens per side of the map; 0: as many windows as fill 56 x 56, Swin's and As-ViT's first map, or 8 x 56 x 56
    size: int = 0
    biased: bool = False  # a relative position bias, and a shift by half a window
    kv_window: tuple[int, ...] = ()  # of keys, empty: as window; without a shift

    @property
    def tokens(self) -> int:
        return math.prod(self.window)

    @property
    def keys(self) -> int:
        """Tokens of a window that are attended to."""
        return math.prod(self.kv_window or self.window)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Rows of tiles that its kernels look up, forward first."""
        if is_single_tile(self.keys, self.head_dim, self.bits):
            return "single_tile", "single_tile_backward"
        return "tiled", "tiled_backward", *(("bias_gradient",) if self.biased else ())

    @property
    def kind(self) -> Hashable:
        """Workloads of one row that differ in it are timed side by side, of others only that of largest ``size``."""
        return self.head_dim, self.biased

    def features(self, kernel: str) -> Tiles:
        """The shape that tells the rows of a kernel apart."""
        from asvit_fast.kernels.tile_table import block

        width = block(self.head_dim)
        return {"bits": self.bits, "tokens": self.keys, "block_d": width, "axes": len(self.window)}

    @property
    def shift(self) -> tuple[int, ...]:
        return tuple(side // 2 if self.biased and not self.kv_window else 0 for side in self.window)

    def operands(self, batch: int, device: torch.device) -> list[Tensor]:
        """qkv [B, H, W, 3*heads*d], and the bias [heads, tokens, tokens] if there is one."""
        least = (8, 56, 56)[-len(self.window) :]
        sizes = (self.size or math.ceil(n / side) * side for n, side in zip(least, self.window, strict=True))
        draw = self._draw(device)
        operands = [draw(batch, *sizes, 3 * self.heads * self.head_dim)]
        if self.biased:
            operands.append(draw(self.heads, self.tokens, self.keys).float())  # as under autocast
        return operands

    def ours(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.window_attention(qkv, self.heads, self.window, self.shift, bias, kv_window=self.kv_window or None)

    def prepare(self, kernel: str, batch: int, device: torch.device) -> Run:
        """Random inputs, and a call that starts ``kernel``: the op alone, or with its backward pass."""
        return _run(self.ours, self.operands(batch, device), (), kernel not in ("single_tile", "tiled"))

    def __str__(self) -> str:
        words = f"{'x'.join(map(str, (*self.window, self.head_dim)))} {self.dtype}"
        return f"{words} biased" if self.biased else words


@dataclass(frozen=True)
class EmbedWorkload(_Call):
    """Patch embedding with LayerNorm of a square image, parameters differentiated. The rows do not depend on stride and
    dilation, that is on re-tokenization."""

    patch: int  # pixels per side
    channels: int
    size: int = 224
    stride: int = EMBED_STRIDE

    @property
    def kernels(self) -> tuple[str, ...]:
        return "patch_embed", "patch_embed_norm_gradient", "patch_embed_weight_gradient"

    @property
    def kind(self) -> Hashable:
        return self.patch, self.channels

    def features(self, kernel: str) -> Tiles:
        from asvit_fast.kernels.patch_embed import channel_block, pixel_count

        pixels = pixel_count(3, self.patch)
        return {"bits": self.bits, "pixels": pixels, "block_d": channel_block(kernel, self.channels)}

    def operands(self, batch: int, device: torch.device) -> list[Tensor]:
        """image [B, 3, size, size], weight, bias, norm_weight, norm_bias."""
        draw = self._draw(device)
        image = draw(batch, 3, self.size, self.size)
        return [image, draw(self.channels, 3, self.patch, self.patch), *(draw(self.channels) for _ in range(3))]

    def ours(self, image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return embed_patches(image, weight, bias, self.stride, 1, norm_weight, norm_bias, 1e-5)

    def prepare(self, kernel: str, batch: int, device: torch.device) -> Run:
        image, *parameters = self.operands(batch, device)
        return _run(self.ours, parameters, (image,), kernel != "patch_embed")

    def __str__(self) -> str:
        return f"{self.patch}x{self.patch} pixels to {self.channels} {self.dtype}"


@dataclass(frozen=True)
class MergeWorkload(_Call):
    """Patch merging by two of a square map."""

    kernel: int  # tokens per side
    channels: int
    outputs: int
    size: int  # tokens per side of the map

    @property
    def kernels(self) -> tuple[str, ...]:
        return "patch_merge", "patch_merge_input", "patch_merge_products"

    @property
    def kind(self) -> Hashable:
        return self.kernel, self.channels

    def features(self, kernel: str) -> Tiles:
        return {"bits": self.bits, "outputs": self.outputs}

    def operands(self, batch: int, device: torch.device) -> list[Tensor]:
        """x [B, size, size, channels], weight [outputs, features], norm_weight, norm_bias."""
        draw, features = self._draw(device), self.channels * self.kernel**2
        x = draw(batch, self.size, self.size, self.channels)
        return [x, draw(self.outputs, features), draw(features), draw(features)]

    def ours(self, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return ops.patch_merge(x, weight, self.kernel, 2, norm_weight, norm_bias)

    def prepare(self, kernel: str, batch: int, device: torch.device) -> Run:
        return _run(self.ours, self.operands(batch, device), (), kernel != "patch_merge")

    def __str__(self) -> str:
        return f"{self.kernel}x{self.kernel}x{self.channels} to {self.outputs} {self.dtype}"


Workload = AttentionWorkload | EmbedWorkload | MergeWorkload

SHAPES = {  # of an op: what it is written like, how many numbers, its workload
    "window_attention": "ROWSxCOLUMNSxHEAD_DIM, 7x7x32, with a b for bias and shift, 7x7x32b",
    "patch_embed": "PATCHxCHANNELS, 4x96",
    "patch_merge": "KERNELxCHANNELSxOUTPUTSxSIDE, 2x96x192x56",
}


def workload_of(op: str, shape: str) -> Workload:
    """The workload that text describes, as ``SHAPES`` says. Raises InputError for other text."""
    biased = op == "window_attention" and shape.endswith("b")
    try:
        numbers = [int(number) for number in shape.removesuffix("b" if biased else "").split("x")]
        if min(numbers) < 1:
            raise ValueError
        if op == "window_attention" and len(numbers) in (3, 4):
            return AttentionWorkload(tuple(numbers[:-1]), numbers[-1], biased=biased)
        if op == "patch_embed":
            patch, channels = numbers
            return EmbedWorkload(patch, channels)
        kernel, channels, outputs, side = numbers
        return MergeWorkload(kernel, channels, outputs, side)
    except ValueError:
        raise InputError(f"shape of {op}: expected {SHAPES[op]}, got {shape!r}") from None


# stages of Swin-T and S, attention of Swin-B too, which has the same rows (arXiv 2103.14030); attention of Swin UNETR
# (arXiv 2201.01266) and of Video Swin (arXiv 2106.13230)
SWIN: dict[str, list[Workload]] = {
    "window_attention": [
        AttentionWorkload((7, 7), 32, 4, 56, biased=True),
        AttentionWorkload((7, 7, 7), 16, biased=True),
        AttentionWorkload((8, 7, 7), 32, biased=True),
    ],
    "patch_embed": [EmbedWorkload(4, 96)],
    "patch_merge": [MergeWorkload(2, 96 * 2**i, 192 * 2**i, 56 // 2**i) for i in range(3)],
}


def topology_workloads(topology: Topology, img_size: ImageSize, names: Sequence[str] = TUNED_OPS) -> list[Workload]:
    """The ops ``names`` of every stage, but for embeddings wider than their kernels go."""
    side = max(image_sides(img_size))
    found: dict[str, list[Workload]] = {name: [] for name in TUNED_OPS}
    dims = topology.dims
    for index, (stage, dim, heads) in enumerate(zip(topology.stages, dims, topology.stage_heads, strict=True)):
        grid = math.ceil(side / (EMBED_STRIDE * 2**index))
        window = math.ceil(grid / stage.splits)
        found["window_attention"].append(AttentionWorkload((window, window), dim // heads, heads, grid))
        if index > 0:
            before = math.ceil(side / (EMBED_STRIDE * 2 ** (index - 1)))
            found["patch_merge"].append(MergeWorkload(stage.kernel, dims[index - 1], dim, before))
        elif dim <= MAXIMUM_CHANNELS:
            found["patch_embed"].append(EmbedWorkload(stage.kernel, dim, side))
    return [workload for name in names for workload in found[name]]


def default_workloads(img_size: ImageSize = 224, names: Sequence[str] = TUNED_OPS) -> list[Workload]:
    """The paper's topologies (arXiv 2202.11921, Table 4), the seed's with 16 and 64 heads too, and Swin-T, S and B."""
    named = [Topology.parse(name) for name in NAMED_TOPOLOGIES]  # depths make no difference
    seeds = [replace(Topology.parse("asvit_seed"), heads=heads) for heads in (16, 64)]
    found = [w for topology in (*named, *seeds) for w in topology_workloads(topology, img_size, names)]
    return [*found, *(workload for name in names for workload in SWIN[name])]
