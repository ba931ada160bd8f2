"""How exact an op must be, against float64: what tests of all ops ask."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-3, torch.bfloat16: 1e-2}

FEW = 16  # numbers, whose norm says no more than the largest: sums over a map for each head, say


def assert_accurate(what: str, got: Tensor, torchs: Tensor, exact: Tensor, tiny: float = 0.0) -> None:
    """error(got) < 2 error(torch, same dtype) + tiny, by default TINY's, relative to the largest value if above 1; and
    in 16 bits the norm of all errors at most 1.5 of torch's and half a rounding, which sums in 16 bits would exceed. A
    larger `tiny` allows as much more of both.
    """
    assert got.shape == exact.shape, f"{what}: {tuple(got.shape)}, not {tuple(exact.shape)}"
    if not exact.numel():
        return
    wrong, others, least = got.double() - exact, torchs.double() - exact, TINY[got.dtype]
    error, allowed = wrong.abs().max().item(), others.abs().max().item()
    tiny = tiny or least
    assert error < 2 * allowed + tiny * max(1.0, exact.abs().max().item()), f"{what}: {error} against {allowed}"
    if got.dtype.itemsize == 2 and exact.numel() > FEW:
        error, allowed, norm = wrong.norm().item(), others.norm().item(), exact.norm().item()
        half = torch.finfo(got.dtype).eps / 4  # 2^-9 in bfloat16
        more = max(1.0, tiny / least)
        assert error <= 1.5 * allowed + more * half * norm, f"{what}: norm {error} against {allowed} of {norm}"
