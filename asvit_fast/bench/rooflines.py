"""What a machine can do at best, measured: the rate of large matrix products in each type, and the memory's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packed_linear import OWN, library
from .timer import best_seconds

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square products, which small ones do not reach
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes, more than caches hold


@dataclass(frozen=True)
class Peak:
    """The best product rate that was measured on this machine in one type.

    Attributes:
        macs: multiply-adds per second.
        name: the product that reached it.
    """

    macs: float
    name: str


@functools.cache
def product_peak(dtype: torch.dtype, device: torch.device, threads: int) -> Peak:
    """The best of a few large products of torch, on a CPU also of oneDNN's and our kernel's; once per process, type and
    threads."""
    found = []
    for side in SIDES.get(device.type, SIDES["cuda"]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # [side, side]
        for name, product in _products(a, b):
            found.append(Peak(side**3 / best_seconds(product, device), f"{name} {side}x{side}x{side}"))
    return max(found, key=lambda peak: peak.macs)


def _products(a: Tensor, b: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield "torch.mm", lambda: a @ b.t()
    if a.device.type == "cpu" and library(a.dtype) == OWN:
        packed = torch.ops.asvit_fast_C.linear_pack(b)
        yield "our kernel", lambda: torch.ops.asvit_fast_C.linear(a, packed, b.shape[0], None, None, "none")
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available() and a.dtype is not torch.float64:

        def onednn() -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

        try:
            onednn()
        except RuntimeError:  # float16 on a processor without instructions for it
            return
        yield "oneDNN", onednn


@functools.cache
def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.ones(COPIED.get(device.type, COPIED["cuda"]), device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


@dataclass(frozen=True)
class Roofline:
    """The rates that bound an op: nothing that multiplies and moves that much can be faster."""

    product: Peak
    bandwidth: float  # bytes per second, read and written

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Roofline:
        """Measured with the threads that torch has now."""
        threads = torch.get_num_threads()
        return cls(product_peak(dtype, device, threads), copy_bandwidth(device, threads))

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """The least time of work with so many operations of products and so many bytes."""
        return max(flops / (2 * self.product.macs), moved_bytes / self.bandwidth)

    def __str__(self) -> str:
        rate = 2 * self.product.macs / 1e9
        return f"{rate:.0f} GFLOP/s ({self.product.name}), {self.bandwidth / 1e9:.0f} GB/s (copy)"
