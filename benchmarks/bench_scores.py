"""Order-1 and order-2 passes and the NTK Gram of whole networks: ours against what torch offers.

    python benchmarks/bench_scores.py [--img-size 224] [--topology ...] [--csv benchmarks/results/scores.csv]

All providers do the same work on the same weights in one process, in turn; their numbers are checked against float64
before anything is timed. The authors' public code has a benchmark of its own, against_asvit.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timer import Row, compare, print_header, print_rows, save_rows
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends

SEED_TOPOLOGY = "8,2,3|4,1,2|4,1,4|4,1,6|32"
THETAS = 10
BATCH = 16
TOLERANCE = 1e-3  # float32 against float64, relative to the largest value

Run = Callable[[], Any]


def nested_jvp(fn: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order 2 along a circle (the second derivative of the input is -x), as torch.func nests it."""

    def velocity(t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda s: fn(x + s * dx - s * s / 2 * x), (t,), (torch.ones_like(t),))

    zero = torch.zeros((), device=x.device, dtype=x.dtype)
    (y, v), (_, a) = torch.func.jvp(velocity, (zero,), (torch.ones_like(zero),))
    return y, v, a


def per_sample_gram(model: nn.Module, images: Tensor) -> Tensor:
    """The NTK Gram through vmap(grad), one gradient per sample and parameter kept."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if "weight" in name}

    def total(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image.unsqueeze(0),)).sum()

    rows = torch.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, images)
    flat = torch.cat([g.flatten(1) for g in rows.values()], 1)  # [B, parameters]
    return flat @ flat.T


class Features(nn.Module):
    """``score_features`` as a forward, for functional_call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.score_features(x)


def error(got: Any, expected: Any) -> float:
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def run_case(case: str, table: dict[str, Run], expected: Any, device: torch.device, rounds: int) -> list[Row]:
    """Check, then time, every provider."""
    errors = {name: error(run(), expected) for name, run in table.items()}
    wrong = {name: value for name, value in errors.items() if not value < TOLERANCE}
    if wrong:
        raise SystemExit(f"{case}: wrong results, nothing timed: {wrong}")
    timings = compare(table, device, rounds)
    return [Row.of("scores", case, name, timings[name], 0, errors[name]) for name in table]


def network(topology: str, img_size: int, norm: str, device: torch.device) -> af.AsViT:
    torch.manual_seed(0)
    return af.create_model(topology, img_size=img_size, num_classes=0, norm=norm).to(device).eval()


def passes(topology: str, img_size: int, device: torch.device, rounds: int) -> list[Row]:
    """Both orders of the network without norms, as the curve measures it."""
    model = network(topology, img_size, "identity", device)
    exact = network(topology, img_size, "identity", device).double()
    x, dx = torch.randn(2, THETAS, 3, img_size, img_size, device=device)
    fn = model.score_features
    compiled = torch.compile(lambda x, dx: torch.func.jvp(fn, (x,), (dx,)))
    first = {
        "torch.func.jvp, eager": lambda: torch.func.jvp(fn, (x,), (dx,)),
        "torch.func.jvp, compiled": lambda: compiled(x, dx),
        "ours": lambda: af.jvp(fn, x, dx),
    }
    second = {"nested torch.func.jvp, eager": lambda: nested_jvp(fn, x, dx), "ours": lambda: af.jet(fn, x, dx, -x)}
    expected = af.jet(exact.score_features, x.double(), dx.double(), -x.double())
    forward = {"forward alone, eager": lambda: fn(x)}
    size = f"{img_size} px, {THETAS} thetas"
    return [
        *run_case(f"forward, {size}", forward, expected[0], device, rounds),
        *run_case(f"order 1, {size}", first, expected[:2], device, rounds),
        *run_case(f"order 2, {size}", second, expected, device, rounds),
    ]


def gram(topology: str, img_size: int, device: torch.device, rounds: int) -> list[Row]:
    """The NTK of the network with norms."""
    model = network(topology, img_size, "layer", device)
    images = torch.randn(BATCH, 3, img_size, img_size, device=device)
    expected = af.ntk_gram(network(topology, img_size, "layer", device).double(), images.double())
    table = {
        "vmap(grad), eager": torch.no_grad()(partial(per_sample_gram, Features(model), images)),
        "ours": partial(af.ntk_gram, model, images),
    }
    return run_case(f"NTK Gram, {img_size} px, batch {BATCH}", table, expected, device, rounds)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default=SEED_TOPOLOGY, help="default: the paper's seed topology")
    parser.add_argument("--img-size", type=int, default=224, help="pixels per side (default: %(default)s)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--rounds", type=int, default=5, help="turns per provider (default: %(default)s)")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    device = backends.resolve_device(arguments.device)
    print_header(device)
    with torch.no_grad():
        rows = passes(arguments.topology, arguments.img_size, device, arguments.rounds)
    rows += gram(arguments.topology, arguments.img_size, device, arguments.rounds)
    for name in ("torch.func.jvp, eager", "nested torch.func.jvp, eager", "vmap(grad), eager", "forward alone, eager"):
        print_rows([row for row in rows if row.case in {r.case for r in rows if r.provider == name}], baseline=name)
    if arguments.csv is not None:
        save_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
