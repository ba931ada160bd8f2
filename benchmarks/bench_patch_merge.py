"""Patch merging, forward and backward, against unfolding, LayerNorm and Linear in torch.

    python benchmarks/bench_patch_merge.py [--device cpu|cuda] [--dtype float32] [--case Swin] [--csv FILE]

Shapes are those between As-ViT's stages (the seed topology's and a scaled one's, 2 x 2 to 4 x 4 tokens) and Swin's. The
peers: F.unfold of the map, channels first, as As-ViT's authors do it, and where 2 x 2 tokens merge timm's reshaping;
both as they are and through torch.compile. Outputs and gradients are checked against float64 first. Rates count the
products of the Linear layer, 2 FLOP per multiply-add; with --roofline they are also related to the machine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from operators import DTYPES, Operator, Work, measure, operator_arguments, publish, start
from torch import Tensor

from asvit_fast.bench.peers import merge_unfolded
from asvit_fast.bench.rooflines import Roofline
from asvit_fast.ops.patch_merge import patch_merge, patch_merge_reference

TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}  # relative to the largest value of a tensor
STRIDE = 2


@dataclass(frozen=True)
class Case:
    """Merging before one stage."""

    network: str
    side: int  # tokens of the square map
    channels: int
    outputs: int
    kernel: int
    batch: int
    order: str = "unfold"

    @property
    def name(self) -> str:
        merged = f"{self.side}x{self.side}x{self.channels}->{self.outputs}"
        return f"{self.network} {merged}, {self.kernel}x{self.kernel}, B={self.batch}"

    def work(self, dtype: torch.dtype, device: torch.device) -> Work:
        """x, weight, norm_weight and norm_bias."""
        features = self.kernel**2 * self.channels
        x = torch.randn(self.batch, self.side, self.side, self.channels)
        weight = torch.randn(self.outputs, features) / features**0.5
        operands = (x, weight, torch.rand(features) + 0.5, torch.randn(features))
        operands = tuple(operand.to(device, dtype).requires_grad_() for operand in operands)
        tokens = self.batch * (-(-self.side // STRIDE)) ** 2
        moved = sum(operand.numel() for operand in operands) + tokens * self.outputs
        return Work(
            self.name, operands, partial(on_case, patch_merge_reference, self), moved * operands[0].element_size(),
            2.0 * tokens * features * self.outputs, "FLOP",
        )  # fmt: skip


SHAPES = [  # network, side, channels, outputs, kernels, order
    ("seed", 56, 32, 64, (4, 3, 2), "unfold"),
    ("seed", 28, 64, 128, (4,), "unfold"),
    ("seed", 14, 128, 256, (4,), "unfold"),
    ("As-ViT-S", 56, 88, 176, (4,), "unfold"),
    ("As-ViT-S", 28, 176, 352, (4,), "unfold"),
    ("As-ViT-S", 14, 352, 704, (4,), "unfold"),
    ("Swin-T", 56, 96, 192, (2,), "timm"),
    ("Swin-T", 28, 192, 384, (2,), "timm"),
    ("Swin-T", 14, 384, 768, (2,), "timm"),
]
CASES = [
    Case(network, side, channels, outputs, kernel, batch, order)
    for network, side, channels, outputs, kernels, order in SHAPES
    for kernel in kernels
    for batch in (1, 4, 16)
]


def on_case(
    merge: Callable[..., Tensor], case: Case, x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """An implementation with the signature of the op, on one case."""
    return merge(x, weight, case.kernel, STRIDE, norm_weight, norm_bias, order=case.order)


def reshaped(
    x: Tensor, weight: Tensor, kernel: int, stride: int, norm_weight: Tensor, norm_bias: Tensor, order: str
) -> Tensor:
    """As timm's Swin merges 2 x 2 tokens."""
    batch, height, width, channels = x.shape
    patches = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    axes = (0, 1, 3, 4, 2, 5) if order == "timm" else (0, 1, 3, 5, 2, 4)
    patches = patches.permute(axes).flatten(3)  # [B, H/2, W/2, 4*C]
    return F.linear(F.layer_norm(patches, (patches.shape[3],), norm_weight, norm_bias), weight)


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "ours": patch_merge,
    "unfold + LN + Linear": merge_unfolded,
    "reshape + LN + Linear": reshaped,
}


def providers(case: Case, compiled: bool) -> dict[str, Operator]:
    """Who takes part, by name."""
    table = {name: merge for name, merge in PROVIDERS.items() if merge is not reshaped or case.kernel == 2}
    if compiled:
        peers = {name: merge for name, merge in table.items() if merge is not patch_merge}
        table |= {f"{name}, compiled": torch.compile(merge, dynamic=False) for name, merge in peers.items()}
    return {name: partial(on_case, merge, case) for name, merge in table.items()}


def main() -> None:
    """Run all cases."""
    parser = operator_arguments(__doc__.splitlines()[0])
    parser.add_argument("--roofline", action="store_true", help="relate our forward rates to the machine's")
    arguments = parser.parse_args()
    device, dtype = start(arguments), DTYPES[arguments.dtype]
    roofline = Roofline.of(dtype, device) if arguments.roofline else None
    if roofline is not None:
        print(f"roofline: {roofline}")
    for case in dict.fromkeys(replace(case, batch=arguments.batch or case.batch) for case in CASES):
        if arguments.case not in case.name:
            continue
        torch.compiler.reset()
        table = providers(case, not arguments.no_compile)
        work, tolerance = case.work(dtype, device), TOLERANCE[arguments.dtype]
        rows = measure("patch_merge", work, table, arguments.modes, arguments.rounds, tolerance)
        publish(rows, arguments.csv, device)
        for row in rows:
            if roofline is not None and (row.provider, row.mode) == ("ours", "forward"):
                least = roofline.seconds(work.operations, work.moved_bytes)
                print(f"{row.case}: {100 * 1e3 * least / row.milliseconds:.0f} % of the roofline")


if __name__ == "__main__":
    main()
