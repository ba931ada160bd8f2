"""Patch embedding against what torch offers for it: convolution, then LayerNorm over the channels, channels last.

    python benchmarks/bench_patch_embed.py [--device cpu|cuda] [--threads 2] [--dtype float32] [--mode forward]
        [--batch 1 8] [--rounds 10] [--csv FILE]

Images of 224 x 224; kernels, strides and dilations of As-ViT's topologies and of their re-tokenization. Every provider
is checked against float64, forward and backward, before anything is timed; if one is wrong, the program ends with exit
code 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.bench.peers import embed_convolution
from asvit_fast.bench.rooflines import Roofline
from asvit_fast.bench.timer import Row, compare, compare_replayed, print_header, print_rows, save_rows
from asvit_fast.cost import peak_allocation
from asvit_fast.nn.patch_embed import embed_patches
from asvit_fast.ops.patch_embed import patch_embed_reference

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-2, torch.bfloat16: 1e-1}  # relative to the largest value
SIDE = 224
BASELINE = "conv channels_last + LN"
MODES = ("forward", "backward", "both")

Embed = Callable[..., Tensor]  # (image, weight, bias, norm_weight, norm_bias) -> [B, Ho, Wo, C]


@dataclass(frozen=True)
class Case:
    """One patch embedding of `batch` images [3, SIDE, SIDE]."""

    batch: int
    channels: int
    kernel: int
    stride: int
    dilation: int

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.channels}, K {self.kernel} / {self.stride}, dil. {self.dilation}"

    @property
    def grid(self) -> int:
        """Tokens along a side."""
        return -(-SIDE // self.stride)

    @property
    def padding(self) -> tuple[int, int, int, int]:
        span = self.dilation * (self.kernel - 1) + 1
        before = max(span - self.stride, 0) // 2
        after = max((self.grid - 1) * self.stride + span - SIDE - before, 0)
        return before, after, before, after

    def operands(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """image, weight, bias, norm_weight, norm_bias; gradients for all but the image."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.batch, 3, SIDE, SIDE), (self.channels, 3, self.kernel, self.kernel), *[(self.channels,)] * 3]
        image, *parameters = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return [image, *(parameter.requires_grad_() for parameter in parameters)]

    def flops(self, mode: str) -> int:
        """FLOPs of the products that cannot be avoided: one for the output, one for the gradient of the weight."""
        once = 2 * self.batch * self.grid**2 * 3 * self.kernel**2 * self.channels
        return once * (2 if mode == "both" else 1)

    def moved_bytes(self, mode: str, size: int) -> int:
        """Read the image and write the output, or read the image and the output's gradient."""
        once = size * self.batch * (3 * SIDE**2 + self.grid**2 * self.channels)
        return once * (2 if mode == "both" else 1)


def cases(batches: list[int]) -> list[Case]:
    """Kernels and widths of the first stage, and the token reductions 4 and 2 per side."""
    table = [(16, 4, 4, 1), (32, 4, 4, 1), (96, 4, 4, 1), (32, 7, 4, 1), (32, 8, 4, 1), (96, 8, 4, 1)]
    table += [(32, 4, 8, 2), (32, 8, 8, 2), (32, 4, 16, 5), (32, 8, 16, 4)]
    return [Case(batch, *row) for batch in batches for row in table]


# --------------------------------------------------------------------------- providers


def ours(case: Case) -> Embed:
    def run(image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return embed_patches(image, weight, bias, case.stride, case.dilation, norm_weight, norm_bias, 1e-5)

    return run


def convolution(case: Case) -> Embed:
    """As a user of torch writes it; channels_last if the operands are."""

    def run(image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        geometry = (case.stride, case.dilation, case.padding)
        return embed_convolution(image, weight, bias, *geometry, norm_weight, norm_bias)

    return run


def matrix_product(case: Case) -> Embed | None:
    """Patches that do not overlap are a reshape away from a matrix product."""
    if case.kernel != case.stride or case.dilation > 1:
        return None

    def run(image: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        patches = image.unflatten(2, (case.grid, case.kernel)).unflatten(4, (case.grid, case.kernel))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, Ho, Wo, 3*K*K]
        return F.layer_norm(F.linear(patches, weight.flatten(1), bias), norm_weight.shape, norm_weight, norm_bias)

    return run


PROVIDERS: dict[str, tuple[Callable[[Case], Embed | None], bool]] = {  # and whether images come channels_last
    "ours": (ours, False),
    "ours, channels_last image": (ours, True),
    BASELINE: (convolution, True),
    "conv NCHW + permute + LN": (convolution, False),
    "reshape + matmul + LN": (matrix_product, False),
}


def with_isa(isa: str, embed: Embed, *operands: Tensor) -> Tensor:
    """Our CPU kernels with one instruction set, but for a backward pass, which comes after."""
    extension = _extension.extension()
    before = extension.get_isa()
    extension.set_isa(isa)
    try:
        return embed(*operands)
    finally:
        extension.set_isa(before)


def providers(case: Case, mode: str, device: torch.device, compiled: bool) -> dict[str, tuple[Embed, bool]]:
    """Who takes part, by name, and whether images come channels_last."""
    table = {name: (make(case), last) for name, (make, last) in PROVIDERS.items()}
    if mode == "forward" and device.type == "cpu" and _extension.extension() is not None:
        slower = _extension.extension().available_isas()[1:]
        table |= {f"ours, {isa}": (partial(with_isa, isa, ours(case)), False) for isa in slower}
    if compiled:
        torch.compiler.reset()
        table[f"{BASELINE}, compiled"] = (torch.compile(convolution(case), dynamic=False), True)
    return {name: (embed, last) for name, (embed, last) in table.items() if embed is not None}


def prepared(operands: list[Tensor], last: bool) -> list[Tensor]:
    if not last:
        return operands
    image, weight, *vectors = operands
    image, weight = (x.detach().to(memory_format=torch.channels_last) for x in (image, weight))
    return [image, weight.requires_grad_(), *vectors]


# --------------------------------------------------------------------------- measurements


def errors(case: Case, run: Embed, operands: list[Tensor], gradient: Tensor, exact: list[Tensor]) -> float:
    """Largest deviation of the output or a gradient, relative to its largest value."""
    out = run(*operands)
    found = [out, *torch.autograd.grad(out, operands[1:], gradient)]
    pairs = zip(found, exact, strict=True)
    return max(((got.double() - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def exact_results(case: Case, operands: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients of the parameters in float64."""
    image, *parameters = (x.detach().double() for x in operands)
    weight, bias, norm_weight, norm_bias = (x.requires_grad_() for x in parameters)
    settings = (case.stride, case.dilation, case.padding)
    out = patch_embed_reference(image, weight, bias, *settings, norm_weight, norm_bias)
    return [out.detach(), *torch.autograd.grad(out, parameters, gradient.double())]


def timed(mode: str, embed: Embed, operands: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    """One pass of a mode, ready to run."""

    def forward() -> Tensor:
        with torch.no_grad():
            return embed(*operands)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(embed(*operands), operands[1:], gradient)

    if mode != "backward":
        return forward if mode == "forward" else both
    recorded: list[Tensor] = []  # by the first call, whose stream a graph of the others has to be captured on

    def backward() -> tuple[Tensor, ...]:
        if not recorded:
            recorded.append(embed(*operands))
        return torch.autograd.grad(recorded[0], operands[1:], gradient, retain_graph=True)

    return backward


def peak_megabytes(run: Callable[[], object], device: torch.device) -> float:
    """Memory of one call, beyond its operands and what is only made once."""
    run()
    return peak_allocation(run, device) / 1e6


@dataclass(frozen=True)
class PatchRow(Row):
    """A row with what a product and a memory would say of it."""

    gigaflop_per_second: float = 0.0
    roofline_share: float = 0.0  # of the time that the machine needs at least
    peak_megabytes: float = 0.0


def run_case(
    case: Case,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    compiled: bool,
    roofline: Roofline,
) -> list[PatchRow]:
    """Check and time every provider on one case."""
    operands = case.operands(device, dtype)
    gradient = torch.randn(case.batch, case.grid, case.grid, case.channels, device=device).to(dtype)
    exact = exact_results(case, operands, gradient)
    table = {
        name: (embed, prepared(operands, last))
        for name, (embed, last) in providers(case, mode, device, compiled).items()
    }
    found = {name: errors(case, embed, own, gradient, exact) for name, (embed, own) in table.items()}
    wrong = {name: value for name, value in found.items() if not value < TOLERANCE[dtype]}
    if any(name.startswith("ours") for name in wrong):
        raise SystemExit(f"{case.name}, {mode}: wrong results, nothing timed: {wrong}")
    if wrong:
        print(f"{case.name}, {mode}: left out, wrong by more than {TOLERANCE[dtype]:g}: {wrong}")
        table = {name: provider for name, provider in table.items() if name not in wrong}
    runs = {name: timed(mode, embed, own, gradient) for name, (embed, own) in table.items()}
    memory = {name: peak_megabytes(run, device) for name, run in runs.items()}
    timings = compare(runs, device, rounds)
    replays = compare_replayed(
        {name: timed(mode, embed, own, gradient) for name, (embed, own) in table.items()}, device, rounds
    )
    flops, moved = case.flops(mode), case.moved_bytes(mode, operands[0].element_size())
    floor = roofline.seconds(flops, moved)
    rows = []
    for name, timing in timings.items():
        title = f"{case.name}, {mode}, {str(dtype)[6:]}"
        row = Row.of("patch_embed", title, name, timing, moved, found[name], replays.get(name))
        rate, share = round(flops / timing.median / 1e9, 1), round(floor / timing.median, 3)
        rows.append(PatchRow(**vars(row), gigaflop_per_second=rate, roofline_share=share, peak_megabytes=memory[name]))
    return rows


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16 (default: float32 on a CPU)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", nargs="+", type=int, default=None, help="images (default: 1 8, on CUDA 16 128)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=10, help="turns per provider")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    print_header(device)
    roofline = Roofline.of(dtype, device)
    print(f"roofline: {roofline}")
    chosen = cases(arguments.batch or ([16, 128] if on_gpu else [1, 8]))
    for case in (case for case in chosen if arguments.case in case.name):
        for mode in arguments.mode:
            rows = run_case(case, mode, dtype, device, arguments.rounds, not arguments.no_compile, roofline)
            print_rows(rows, baseline=BASELINE)
            for row in rows:
                share, rate = 100 * row.roofline_share, row.gigaflop_per_second
                print(f"    {row.provider:34} {rate:8.1f} GFLOP/s {share:6.1f} % {row.peak_megabytes:8.2f} MB at most")
            if arguments.csv is not None:
                save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
