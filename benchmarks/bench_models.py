"""Whole networks of timm and torchvision, as they are and through `accelerate`: inference and training steps.

    python benchmarks/bench_models.py [--device cpu|cuda] [--models swin_tiny_patch4_window7_224] [--csv FILE]

Every network exists once and is copied for each provider, so that all have the same weights. Logits and gradients of
all parameters are checked against float64 before anything is timed. A training step is forward and backward of a
cross-entropy; stochastic depth and dropout are off, as they would differ between providers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from operators import DTYPES
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.bench.timer import Row, Timing, compare, print_header, save_rows
from asvit_fast.cost import peak_allocation

MODELS = [
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "torchvision/swin_t",
    "maxvit_tiny_tf_224",
    "tiny_vit_5m_224",
    "davit_tiny",
    "twins_svt_small",
    "nest_tiny_jx",
    "pvt_v2_b1",
    "convnext_tiny",
    "asvit_small",
]
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1, "float16": 5e-2}  # relative, of all tensors together


@dataclass(frozen=True)
class ModelRow(Row):
    """A row with what it depends on besides the machine."""

    mode: str = ""
    dtype: str = ""
    batch: int = 0
    images_per_second: float = 0.0
    peak_mebibytes: float = 0.0


def build(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network with random weights, the same on every call."""
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        import torchvision

        model = torchvision.models.get_model(name.removeprefix("torchvision/"))
        for module in model.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0
    else:
        model = timm.create_model(name, drop_path_rate=0.0)
    return model.to(device, dtype)


def image_size(name: str) -> int:
    if name.startswith("torchvision/") or name.startswith("asvit"):
        return 224
    config: Any = timm.get_pretrained_cfg(name)
    return 224 if config is None else config.input_size[-1]


def fused_attention(model: nn.Module) -> nn.Module:
    """timm's modules with its switch for torch's fused attention on, as TIMM_FUSED_ATTN=2 makes them."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


def accelerated(model: nn.Module) -> nn.Module:
    af.accelerate(model)
    return model


def providers(model: nn.Module, compiled: bool) -> dict[str, nn.Module]:
    """Who takes part, by name. Our own networks run on our ops as they are: their peer is the same network on torch's
    operations."""
    table: dict[str, nn.Module] = {"source": copy.deepcopy(model)}
    if isinstance(model, af.AsViT):
        table["asvit_fast"] = copy.deepcopy(model)
    else:
        if any(hasattr(module, "fused_attn") for module in model.modules()):
            table["source, fused attention"] = fused_attention(copy.deepcopy(model))
        table["asvit_fast"] = accelerated(copy.deepcopy(model))
    if compiled:
        table |= {f"{name}, compiled": torch.compile(network, dynamic=False) for name, network in table.items()}
    return table


def relative_distance(got: list[Tensor], exact: list[Tensor]) -> float:
    """Error of all tensors together: a bias before a batch norm has a gradient of zero, and errors relative to that."""
    pairs = list(zip(got, exact, strict=True))
    apart = sum((a.double() - b).square().sum() for a, b in pairs)
    return (apart / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def inference(model: nn.Module, image: Tensor, own: bool) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [model(image)]

    return run if not own else on_torch(run)


def training_step(model: nn.Module, image: Tensor, labels: Tensor, own: bool) -> Callable[[], list[Tensor]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> list[Tensor]:
        loss = F.cross_entropy(model(image).float(), labels)
        return [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]

    return run if not own else on_torch(run)


def on_torch(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Our own network as the source: on torch's operations instead of our ops."""

    def reference() -> list[Tensor]:
        with backends.use_backend("reference"):
            return run()

    return reference


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> list[ModelRow]:
    """Check and time every provider of one network."""
    dtype = DTYPES[arguments.dtype]
    model = build(name, dtype, device)
    size = image_size(name)
    image = torch.randn(arguments.batch, 3, size, size, device=device, dtype=dtype)
    labels = torch.randint(1000, (arguments.batch,), device=device)
    table = providers(model, not arguments.no_compile)
    own = isinstance(model, af.AsViT)
    exact = copy.deepcopy(model).double()
    rows = []
    for mode in arguments.modes:
        train = mode == "train"
        for network in (exact, *table.values()):
            network.train(train)

        def run_of(network: nn.Module, image: Tensor, who: str, train: bool = train) -> Callable[[], list[Tensor]]:
            reference = own and who.startswith("source")
            return training_step(network, image, labels, reference) if train else inference(network, image, reference)

        want = run_of(exact, image.double(), "source")()
        runs = {who: run_of(network, image, who) for who, network in table.items()}
        errors = {who: relative_distance(run(), want) for who, run in runs.items()}
        wrong = {who: error for who, error in errors.items() if not error < TOLERANCE[arguments.dtype]}
        if wrong:
            raise SystemExit(f"{name}, {mode}: wrong results, nothing timed: {wrong}")
        memory = {who: peak_allocation(run, device) for who, run in runs.items()}
        timings = compare(runs, device, arguments.rounds)
        rows += [row(name, mode, who, arguments, timings[who], errors[who], memory[who]) for who in runs]
    return rows


def row(
    name: str, mode: str, who: str, arguments: argparse.Namespace, timing: Timing, error: float, memory: int
) -> ModelRow:
    base = Row.of("models", name, who, timing, 0, error)
    return ModelRow(
        **vars(base), mode=mode, dtype=arguments.dtype, batch=arguments.batch,
        images_per_second=round(arguments.batch / timing.median, 2), peak_mebibytes=round(memory / 2**20, 1),
    )  # fmt: skip


def print_models(rows: list[ModelRow]) -> None:
    """Print a table; the last column says how many times faster than the source a provider is."""
    source = {(row.case, row.mode): row.milliseconds for row in rows if row.provider == "source"}
    print(
        f"{'network':32} {'mode':9} {'provider':34} {'ms':>9} {'quartiles':>19} {'img/s':>7} {'MiB':>7} {'error':>8}"
        f" {'speed':>7}"
    )
    for row in rows:
        quartiles = f"{row.lower_quartile:.1f} .. {row.upper_quartile:.1f}"
        print(
            f"{row.case:32} {row.mode:9} {row.provider:34} {row.milliseconds:9.1f} {quartiles:>19} "
            f"{row.images_per_second:7.1f} {row.peak_mebibytes:7.0f} {row.error:8.1e} "
            f"{source[row.case, row.mode] / row.milliseconds:6.2f}x"
        )


def main() -> None:
    """Run all networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of weights and images")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names, or torchvision/NAME")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--modes", nargs="+", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=5, help="turns per provider")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    print_header(device)
    for name in arguments.models:
        torch.compiler.reset()
        rows = measure(name, arguments, device)
        print_models(rows)
        if arguments.csv is not None:
            save_rows(arguments.csv, list(rows), device)


if __name__ == "__main__":
    main()
