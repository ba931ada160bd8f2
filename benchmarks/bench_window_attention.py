"""Windowed attention, forward and backward, against every way to run it with torch.

    python benchmarks/bench_window_attention.py [--device cpu|cuda] [--dtype float32] [--case N=49] [--csv FILE]

All providers get the fused projection [B, *size, 3*heads*head_dim] and return [B, *size, heads*head_dim]: the copies
that cut the map into windows and put it together again belong to the work. Shapes are those of As-ViT's stages (windows
of 784, 196 and 49 tokens, head_dim 8 to 45), of Swin-T's, with its bias and shift, and of networks for volumes and
videos. Outputs and gradients are checked against float64 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from operators import DTYPES, Operator, Work, measure, operator_arguments, publish, start
from torch import Tensor
from torch.nn.attention import SDPBackend

from asvit_fast.bench.peers import attention_eager, attention_sdpa
from asvit_fast.ops.window_attention import window_attention, window_attention_reference
from asvit_fast.ops.windows import merge_windows, partition_windows, split_heads, window_mask

TOLERANCE = {"float32": 2e-4, "bfloat16": 6e-2, "float16": 1e-2}  # relative to the largest value of a tensor

try:
    from torch.nn.attention.flex_attention import flex_attention
except ImportError:  # not in every build of torch
    flex_attention = None


@dataclass(frozen=True)
class Case:
    """Attention of one layer."""

    name: str
    batch: int
    size: tuple[int, ...]  # of the map in tokens, as the next two
    window: tuple[int, ...]
    heads: int
    head_dim: int
    shift: tuple[int, ...] = ()
    bias: bool = False

    @property
    def geometry(self) -> tuple[list[int], list[int]]:
        return list(self.window), list(self.shift or (0,) * len(self.window))

    def work(self, dtype: torch.dtype, device: torch.device) -> Work:
        channels, tokens = self.heads * self.head_dim, math.prod(self.window)
        qkv = torch.randn(self.batch, *self.size, 3 * channels, device=device, dtype=dtype).requires_grad_()
        operands = [qkv]
        if self.bias:
            operands.append(torch.randn(self.heads, tokens, tokens, device=device, dtype=dtype).requires_grad_())
        exact = partial(with_flags, reference, self)
        windows = math.prod(-(-n // w) for n, w in zip(self.size, self.window, strict=True)) * self.batch
        moved = sum(operand.numel() for operand in operands) + qkv.numel() // 3
        scores = float(windows * self.heads * tokens**2)
        return Work(self.name, tuple(operands), exact, moved * qkv.element_size(), scores, "score")


CASES = [
    Case("N=784 d=8 (As-ViT stage 1)", 2, (56, 56), (28, 28), 4, 8),
    Case("N=196 d=8 (As-ViT stage 2)", 2, (28, 28), (14, 14), 8, 8),
    Case("N=49 d=8 (As-ViT stage 3)", 8, (14, 14), (7, 7), 16, 8),
    Case("N=49 d=8, one window (stage 4)", 8, (7, 7), (7, 7), 32, 8),
    Case("N=784 d=22 (As-ViT-B stage 1)", 2, (56, 56), (28, 28), 4, 22),
    Case("N=196 d=45 (As-ViT-L stage 2)", 2, (28, 28), (14, 14), 8, 45),
    Case("N=49 d=16", 8, (14, 14), (7, 7), 16, 16),
    Case("N=49 d=32", 8, (14, 14), (7, 7), 12, 32),
    Case("N=49 d=32, bias (Swin-T stage 1)", 4, (56, 56), (7, 7), 3, 32, bias=True),
    Case("N=49 d=32, bias, shift (stage 1)", 4, (56, 56), (7, 7), 3, 32, (3, 3), True),
    Case("N=49 d=32, bias, shift (stage 3)", 8, (14, 14), (7, 7), 12, 32, (3, 3), True),
    Case("N=144 d=32, bias, shift", 2, (24, 24), (12, 12), 12, 32, (6, 6), True),
    Case("N=49 d=32, bias, padded 50x50", 4, (50, 50), (7, 7), 3, 32, bias=True),
    Case("7x7x7 d=16, bias (SwinUNETR stage 1)", 1, (28, 28, 28), (7, 7, 7), 3, 16, bias=True),
    Case("7x7x7 d=16, bias, shift (SwinUNETR stage 1)", 1, (28, 28, 28), (7, 7, 7), 3, 16, (3, 3, 3), True),
    Case("7x7x7 d=16, bias, shift, padded 24x24x24", 1, (24, 24, 24), (7, 7, 7), 6, 16, (3, 3, 3), True),
    Case("8x7x7 d=32, bias, shift (Swin3D-T stage 1)", 1, (8, 56, 56), (8, 7, 7), 3, 32, (0, 3, 3), True),
    Case("2x7x7 d=32, bias, shift", 1, (8, 28, 28), (2, 7, 7), 6, 32, (1, 3, 3), True),
]


def with_flags(attend: Operator, case: Case, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """An implementation with the signature of the reference, on one case."""
    window, shift = case.geometry
    return attend(qkv, case.heads, window, shift, bias)


def reference(qkv: Tensor, heads: int, window: list[int], shift: list[int], bias: Tensor | None) -> Tensor:
    return window_attention_reference([qkv], heads, window, shift, bias)


def ours(qkv: Tensor, heads: int, window: list[int], shift: list[int], bias: Tensor | None) -> Tensor:
    return window_attention(qkv, heads, tuple(window), tuple(shift), bias)


def flex(qkv: Tensor, heads: int, window: list[int], shift: list[int], bias: Tensor | None, attend: Any) -> Tensor:
    """FlexAttention with the bias as a score modification; the mask of a shift is part of the table."""
    batch, size = qkv.shape[0], list(qkv.shape[1:-1])
    q, k, v = (x.flatten(0, 1) for x in split_heads(partition_windows(qkv, window, shift), heads))
    mask = window_mask(size, window, shift, qkv.dtype, qkv.device)  # [windows, tokens, tokens]
    windows = 1 if mask is None else mask.shape[0]

    def modify(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if bias is not None:
            score = score + bias[head, query, key]
        return score if mask is None else score + mask[image % windows, query, key]

    out = attend(q.contiguous(), k.contiguous(), v.contiguous(), score_mod=modify)
    out = out.unflatten(0, (batch, -1)).transpose(2, 3).flatten(3)
    return merge_windows(out, size, window, shift)


SDPA_BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "cuda": [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ],
}  # fmt: skip


def providers(case: Case, device: torch.device, compiled: bool) -> dict[str, Operator]:
    """Who takes part, by name. Those that refuse a case are left out with their reason when they are first run."""
    table: dict[str, Callable[..., Tensor]] = {"ours": ours, "eager": attention_eager, "SDPA, default": attention_sdpa}
    for backend in SDPA_BACKENDS[device.type]:
        name = backend.name.lower().removesuffix("_attention")
        table[f"SDPA, {name}"] = partial(attention_sdpa, backend=backend)
    if case.head_dim % 8:
        table["SDPA, head_dim padded to 8"] = partial(attention_sdpa, pad_to=8)
    if compiled:
        table["eager, compiled"] = torch.compile(attention_eager, dynamic=False)
        table["SDPA, compiled"] = torch.compile(attention_sdpa, dynamic=False)
        if flex_attention is not None:
            table["FlexAttention"] = partial(flex, attend=torch.compile(flex_attention, dynamic=False))
    return {name: partial(with_flags, attend, case) for name, attend in table.items()}


def main() -> None:
    """Run all cases."""
    arguments = operator_arguments(__doc__.splitlines()[0]).parse_args()
    device = start(arguments)
    for case in CASES:
        if arguments.case not in case.name:
            continue
        case = replace(case, batch=arguments.batch or case.batch)
        torch.compiler.reset()
        work = case.work(DTYPES[arguments.dtype], device)
        table = providers(case, device, not arguments.no_compile)
        rows = measure("window_attention", work, table, arguments.modes, arguments.rounds, TOLERANCE[arguments.dtype])
        publish(rows, arguments.csv, device)


if __name__ == "__main__":
    main()
