"""Training steps of As-ViT with and without re-tokenization: images per second, and what becomes of saved FLOPs.

    python benchmarks/bench_training.py [--models asvit_small asvit_base asvit_large] [--batches 128 512] [--csv FILE]
    python benchmarks/bench_training.py --device cpu --tiny --no-compile      # seconds, to see that it runs

A step is a forward pass (bfloat16 autocast unless --dtype says otherwise), cross-entropy, backward pass, fused AdamW
(with a learning rate of 0: all weights stay comparable) and the moving average of the weights, on synthetic images, at
every reduction of tokens. The peer is the same network with torch's operations: windows cut out for
F.scaled_dot_product_attention, a convolution and a LayerNorm for the patch embedding, unfolded neighbourhoods for
merging; eager and compiled. Logits and gradients of all are checked against the peer in float32 before a time counts.
Rows follow for the schedules of Table 6 (As-ViT, arXiv 2202.11921), their time saved over their FLOPs saved, and for
the change of the phase after ``Retokenizer.warmup``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from operators import DTYPES
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from asvit_fast import AsViT, RetokenizationSchedule, backends
from asvit_fast.bench.peers import attention_sdpa
from asvit_fast.bench.providers import relative_distance, tolerance
from asvit_fast.bench.timer import Row, Timing, compare, print_header, save_rows
from asvit_fast.cost import count_macs, peak_allocation
from asvit_fast.nn import Linear, OverlapPatchEmbed, PatchMerging, WindowAttention
from asvit_fast.ops.patch_merge import patch_merge_reference
from asvit_fast.training import Retokenizer

REDUCTIONS = (4, 2, 1)
SCHEDULES = ("table6-40", "table6-80", "table6-120")
TINY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
NOT_TIMED = Timing(float("nan"), float("nan"), float("nan"), 0)
EXACT_AT_ONCE = 32  # images of the check in float32, which has to fit beside all providers


@dataclass(frozen=True)
class TrainingRow(Row):
    """A row with what it depends on besides the machine. Rows of steps have a reduction; rows of schedules have no
    images per second but the saved parts; ``note``: what a reader must know."""

    dtype: str = ""
    batch: int = 0
    reduction: int = 0
    images_per_second: float = 0.0
    peak_mebibytes: float = 0.0
    macs: int = 0  # multiply-adds of the forward pass of one image
    flops_saved: float = 0.0
    time_saved: float = 0.0
    ratio: float = 0.0
    note: str = ""


# --------------------------------------------------------------------------- the peer


class PeerAttention(WindowAttention):
    """Windows cut out, torch's fused attention, windows joined."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)  # [B, H, W, 3*heads*head_dim]
        sides = [max(-(-side // self.splits), 1) for side in qkv.shape[1:3]] if self.window is None else self.window
        x = attention_sdpa(qkv, self.num_heads, list(sides), [0, 0], None)  # [B, H, W, heads*head_dim]
        return F.linear(x, self.proj.weight, self.proj.bias)


class PeerEmbed(OverlapPatchEmbed):
    """torch's convolution and LayerNorm."""

    def forward(self, image: Tensor) -> Tensor:
        span = self.dilation * (self.kernel - 1) + 1
        before = max(span - self.stride, 0) // 2
        after = [max((-(-side // self.stride) - 1) * self.stride + span - side - before, 0) for side in image.shape[2:]]
        image = F.pad(image, (before, after[1], before, after[0]))  # [B, 3, H', W']
        tokens = F.conv2d(image, self.proj.weight, self.proj.bias, stride=self.stride, dilation=self.dilation)
        tokens = tokens.permute(0, 2, 3, 1)  # [B, Ho, Wo, C]
        return tokens if self.norm is None else self.norm(tokens)


class PeerMerging(PatchMerging):
    """Unfolded neighbourhoods, LayerNorm, Linear."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm is None:
            return patch_merge_reference(x, self.reduction.weight, self.kernel, 2)
        # autocast's linear rounds what the LayerNorm returns
        return patch_merge_reference(x, self.reduction.weight, self.kernel, 2, norm.weight, norm.bias, eps=norm.eps)


PEERS = {WindowAttention: PeerAttention, OverlapPatchEmbed: PeerEmbed, PatchMerging: PeerMerging, Linear: nn.Linear}


def peer_of(model: AsViT) -> AsViT:
    """A copy that runs none of our operations."""
    peer = copy.deepcopy(model)
    for module in peer.modules():
        module.__class__ = PEERS.get(type(module), type(module))
    return peer


# --------------------------------------------------------------------------- one provider


class Provider:
    """A network with its optimizer and average; ``step`` is one update."""

    def __init__(self, model: AsViT, compiled: bool, dtype: torch.dtype, images: Tensor, labels: Tensor) -> None:
        self.dtype, self.images, self.labels = dtype, images, labels
        self.model = model.train()
        self.network: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.ema = ModelEmaV3(self.model, decay=0.9999)
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=0.0, weight_decay=0.0, fused=True)

    def autocast(self) -> Any:
        return torch.autocast(self.images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum [] over the images, and the logits [B, classes]."""
        with self.autocast():
            logits = self.network(images)
            return F.cross_entropy(logits, labels, reduction="sum"), logits

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.loss(self.images, self.labels)[0] / len(self.labels)).backward()
        self.optimizer.step()
        self.ema.update(self.model)

    def results(self, at_once: int) -> list[Tensor]:
        """Logits and gradients of all parameters, from ``at_once`` images after the other."""
        parameters = list(self.model.parameters())
        logits, gradients = [], [torch.zeros_like(parameter) for parameter in parameters]
        for images, labels in zip(self.images.split(at_once), self.labels.split(at_once), strict=True):
            loss, part = self.loss(images, labels)
            logits.append(part.detach().float())
            for total, one in zip(gradients, torch.autograd.grad(loss, parameters), strict=True):
                total += one / len(self.labels)
        return [torch.cat(logits), *gradients]


@contextmanager
def memory_kept() -> Iterator[list[str]]:
    """Give memory back after running out of it; the list then has the reason."""
    reasons: list[str] = []
    try:
        yield reasons
    except torch.OutOfMemoryError as error:
        reasons.append(f"out of memory: {str(error).splitlines()[0][:80]}")
    if reasons and torch.cuda.is_available():
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------- one network


@dataclass
class Case:
    """One network and batch: the providers still in the race, and what was found."""

    name: str
    batch: int
    dtype: str
    device: torch.device
    img_size: int
    rounds: int
    compiled: bool
    rows: list[TrainingRow]

    def build(self) -> tuple[dict[str, Provider], Provider]:
        """Providers by name, and the one in float32 that says what is right."""
        torch.manual_seed(0)
        kwargs = {"topology": TINY} if self.name == "tiny" else {}
        model: Any = timm.create_model(
            "asvit" if kwargs else self.name, img_size=self.img_size, num_classes=1000, **kwargs
        ).to(self.device)
        images = torch.randn(self.batch, 3, self.img_size, self.img_size, device=self.device)
        labels = torch.randint(1000, (self.batch,), device=self.device)
        make = partial(Provider, dtype=DTYPES[self.dtype], images=images, labels=labels)
        table = {}
        for who, network in (("ours", model), ("SDPA", peer_of(model))):
            table[who] = make(copy.deepcopy(network), False)
            if self.compiled:
                table[f"{who}, compiled"] = make(copy.deepcopy(network), True)
        exact = Provider(peer_of(model), False, torch.float32, images, labels)
        self.macs = {reduction: self._macs(model, reduction) for reduction in REDUCTIONS}
        return table, exact

    def _macs(self, model: AsViT, reduction: int) -> int:
        model.set_token_reduction(reduction)
        return count_macs(model, self.img_size)

    def measure(self) -> None:
        torch.compiler.reset()
        table, exact = self.build()
        self.medians: dict[str, dict[int, float]] = {who: {} for who in table}
        for reduction in REDUCTIONS:
            for provider in (*table.values(), exact):
                provider.model.set_token_reduction(reduction)
            self._measure_steps(table, exact, reduction)
        self._measure_schedules()
        for who in table:
            self._measure_switch(who, table[who])

    def _measure_steps(self, table: dict[str, Provider], exact: Provider, reduction: int) -> None:
        case = f"{self.name}, batch {self.batch}, 1/{reduction} of the tokens per side"
        runs, errors, memory = {}, {}, {}
        want = exact.results(EXACT_AT_ONCE)
        for who, provider in table.items():
            with memory_kept() as reasons:
                errors[who] = relative_distance(provider.results(self.batch), want)
                provider.step()  # compiles, and fills memory
                memory[who] = peak_allocation(provider.step, self.device)
                runs[who] = provider.step
            if reasons:
                self._row(case, who, NOT_TIMED, 0.0, reduction, note=reasons[0])
        wrong = {who: error for who, error in errors.items() if not error < tolerance(DTYPES[self.dtype], self.device)}
        if wrong:
            raise SystemExit(f"{case}: wrong results, nothing timed: {wrong}")
        for who, timing in compare(runs, self.device, self.rounds).items():
            self.medians[who][reduction] = timing.median
            self._row(
                case, who, timing, errors[who], reduction, peak_mebibytes=round(memory[who] / 2**20, 1),
                images_per_second=round(self.batch / timing.median, 1),
            )  # fmt: skip

    def _measure_schedules(self) -> None:
        """Means over the epochs of a schedule, from the steps' medians."""
        for name in SCHEDULES:
            phases = RetokenizationSchedule.parse(name).phases
            epochs = sum(phase.length for phase in phases)
            macs = sum(phase.length * self.macs[phase.reduction] for phase in phases) / epochs
            flops_saved = 1 - macs / self.macs[1]
            for who, medians in self.medians.items():
                if set(medians) != set(REDUCTIONS):
                    continue  # some step had no memory
                seconds = sum(phase.length * medians[phase.reduction] for phase in phases) / epochs
                saved = 1 - seconds / medians[1]
                self._row(
                    f"{self.name}, batch {self.batch}, {name}", who, Timing(seconds, seconds, seconds, 0), 0.0, 0,
                    flops_saved=round(flops_saved, 4), time_saved=round(saved, 4), ratio=round(saved / flops_saved, 4),
                )  # fmt: skip

    def _measure_switch(self, who: str, provider: Provider) -> None:
        """Time from the last step of a phase to the end of the first one of the next, less a step of that phase."""
        if set(self.medians[who]) != set(REDUCTIONS):
            return
        torch.compiler.reset()  # as in a new process: nothing is compiled yet
        retokenizer = Retokenizer(provider.network, "1:4,1:2,1:1")
        start = time.perf_counter()
        retokenizer.warmup(provider.images, autocast=provider.autocast, evaluate=False)
        warmup = time.perf_counter() - start
        retokenizer.step(0)
        self._timed(provider.step)
        graphs, slowest = compiled_graphs(), 1e-6  # at least a microsecond
        for epoch in (1, 2, 0, 1, 2):
            seconds = self._timed(lambda epoch=epoch: (retokenizer.step(epoch), provider.step()))
            slowest = max(slowest, seconds - self.medians[who][retokenizer.reduction])
        self._row(
            f"{self.name}, batch {self.batch}, change of the phase", who, Timing(slowest, slowest, slowest, 5), 0.0, 0,
            note=f"slowest of 5; {compiled_graphs() - graphs} recompilations; warm-up {warmup:.1f} s",
        )  # fmt: skip

    def _timed(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _row(self, case: str, who: str, timing: Timing, error: float, reduction: int, **values: Any) -> None:
        base = vars(Row.of("training", case, who, timing, 0, error))
        macs = self.macs.get(reduction, 0)
        self.rows.append(
            TrainingRow(**base, dtype=self.dtype, batch=self.batch, reduction=reduction, macs=macs, **values)
        )


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def print_training(rows: list[TrainingRow]) -> None:
    """Print a table; of steps, the last column says how many times faster ours is than a provider."""
    ours = {row.case: row.milliseconds for row in rows if row.provider == "ours"}
    for row in rows:
        text = f"{row.case:48} {row.provider:16} {row.milliseconds:10.2f} ms"
        if row.reduction:
            spread = f"{row.lower_quartile:.2f} .. {row.upper_quartile:.2f}"
            speed = row.milliseconds / ours.get(row.case, float("nan"))
            text += f" {spread:>18} {row.images_per_second:8.1f} img/s {row.peak_mebibytes:8.0f} MiB"
            text += f" error {row.error:7.1e} ours is {speed:5.2f}x"
        elif row.ratio:
            text += f" time saved {row.time_saved:6.1%} FLOPs saved {row.flops_saved:6.1%} ratio {row.ratio:5.2f}"
        print(f"{text} {row.note}".rstrip(), flush=True)


def main() -> None:
    """Run all networks and batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of autocast")
    parser.add_argument("--models", nargs="+", default=["asvit_small", "asvit_base", "asvit_large"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 512], help="images, up to 1024 or so")
    parser.add_argument("--img-size", type=int, default=224, help="pixels")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="turns per provider")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, 2 images of 32 pixels")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = backends.resolve_device(arguments.device)
    print_header(device)
    models = ["tiny"] if arguments.tiny else arguments.models
    for name in models:
        for batch in [2] if arguments.tiny else arguments.batches:
            case = Case(
                name, batch, arguments.dtype, device, 32 if arguments.tiny else arguments.img_size, arguments.rounds,
                not arguments.no_compile, [],
            )  # fmt: skip
            case.measure()
            print_training(case.rows)
            if arguments.csv is not None:
                save_rows(arguments.csv, list(case.rows), device)


if __name__ == "__main__":
    main()
