"""Single ops against the same in torch's operations, and against what the machine allows at best."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import backends
from ..errors import InputError
from ..settings import TUNED_OPS, BenchSettings
from .operators import Case, Check, Operator, OperatorRow, Work
from .peers import attention_eager, attention_sdpa, embed_convolution, merge_unfolded
from .rooflines import Roofline
from .rows import FAILED, WRONG, BenchRow
from .timer import machine
from .workloads import DTYPES, AttentionWorkload, EmbedWorkload, MergeWorkload, Workload, default_workloads, workload_of

TOLERANCE = {"fp32": 2e-4, "bf16": 6e-2, "fp16": 1e-2}  # relative to the largest value of a tensor
PASSES = {"inference": "forward", "train": "both"}


def check_ops(names: Sequence[str], shapes: Sequence[str]) -> Sequence[str]:
    """Raise InputError unless all are ops that have a benchmark, and all shapes are of each: before any is measured."""
    wrong = [name for name in names if name not in TUNED_OPS]
    if wrong or not names:
        raise InputError(f"op must be followed by some of {', '.join(TUNED_OPS)}, got {', '.join(wrong) or 'none'}")
    for name, shape in itertools.product(names, shapes):
        workload_of(name, shape)
    return names


# --------------------------------------------------------------------------- the work, and who does it


def eager(workload: Workload) -> Operator:
    """The op in torch's operations, on operands as the workload draws them."""
    if isinstance(workload, AttentionWorkload):
        return functools.partial(_attention, workload, attention_eager)
    if isinstance(workload, MergeWorkload):
        return lambda x, weight, *norm: merge_unfolded(x, weight, workload.kernel, 2, *norm)
    span, tokens = workload.patch, ceil(workload.size / workload.stride)
    before = max(span - workload.stride, 0) // 2
    padding = (before, (tokens - 1) * workload.stride + span - workload.size - before) * 2
    return lambda image, weight, bias, *norm: embed_convolution(image, weight, bias, workload.stride, 1, padding, *norm)


def _attention(
    workload: AttentionWorkload, attend: Callable[..., Tensor], qkv: Tensor, bias: Tensor | None = None
) -> Tensor:
    bias = None if bias is None else bias.to(qkv.dtype)
    return attend(qkv, workload.heads, list(workload.window), list(workload.shift), bias)


def candidates(workload: Workload, settings: BenchSettings) -> tuple[dict[str, Operator], dict[str, str]]:
    """Who takes part by name, and why others of the settings do not."""
    source = eager(workload)
    table: dict[str, Operator] = {"source": source, "compiled": torch.compile(source, dynamic=False)}
    if isinstance(workload, AttentionWorkload):
        sdpa = functools.partial(_attention, workload, attention_sdpa)
        table |= {"sdpa": sdpa, "sdpa-compiled": torch.compile(sdpa, dynamic=False)}
    reasons = {
        name: "torch's fused attention is for attention alone" if name.startswith("sdpa") else "it runs whole networks"
        for name in settings.against
        if name not in table
    }
    table = {name: table[name] for name in settings.against if name in table}
    table["ours"] = workload.ours
    if settings.compile:
        table["ours-compiled"] = torch.compile(workload.ours, dynamic=False)
    return table, reasons


def work_of(workload: Workload, batch: int, device: torch.device) -> Work:
    """The op on random operands; all but images have gradients."""
    image = isinstance(workload, EmbedWorkload)
    operands = tuple(
        x.requires_grad_(index > 0 or not image) for index, x in enumerate(workload.operands(batch, device))
    )
    source = eager(workload)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        output = workload.ours(*(x.to("meta") for x in operands))  # windows count their real tokens
    moved = sum(x.numel() * x.element_size() for x in (*operands, output))
    return Work(str(workload), operands, source, moved, float(counter.get_total_flops()), "FLOP")


# --------------------------------------------------------------------------- measuring


def measure_op(
    op: str, shapes: Sequence[str], settings: BenchSettings, say: Callable[[str], None] = print
) -> Iterator[list[BenchRow]]:
    """Rows of an op, a list for each shape, mode and size: those in ``shapes``, else those of the paper's networks and
    Swin. Mode train is forward and backward."""
    device = backends.computing_device(settings.device)
    chosen = [workload_of(op, shape) for shape in shapes] or default_workloads(settings.img_size or 224, [op])
    if settings.amp is not None or settings.channels_last:
        raise InputError("amp and channels_last are of networks; give single ops their dtype")
    roofline = Roofline.of(DTYPES[settings.dtype], device)
    say(f"roofline: {roofline}")
    told: set[str] = set()
    for workload in dict.fromkeys(replace(one, dtype=settings.dtype) for one in chosen):
        for batch in sorted(set(settings.batch_sizes)):
            torch.compiler.reset()
            table, reasons = candidates(workload, settings)
            for name, reason in reasons.items():
                if name not in told:
                    say(f"{name} left out, {reason}")
            told |= reasons.keys()
            case = Case(op, work_of(workload, batch, device), table, TOLERANCE[settings.dtype])
            for mode in settings.modes:
                checked = case.check(PASSES[mode])
                rows = case.time(PASSES[mode], checked, settings.rounds)
                yield _rows(f"{op} {workload}", case.work, mode, batch, checked, rows, roofline, settings)


def _least_seconds(work: Work, mode: str, roofline: Roofline) -> float:
    """The time that no op can be faster than. A backward pass has twice the products, reads the operands and the
    output's gradient, and writes gradients of all that have one."""
    if mode == "inference":
        return roofline.seconds(work.operations, work.moved_bytes)
    gradients = sum(x.numel() * x.element_size() for x in work.operands if x.requires_grad)
    return roofline.seconds(3 * work.operations, 2 * work.moved_bytes + gradients)


def _rows(
    title: str,
    work: Work,
    mode: str,
    batch: int,
    checked: Check,
    timed: Sequence[OperatorRow],
    roofline: Roofline,
    settings: BenchSettings,
) -> list[BenchRow]:
    first = work.operands[0]
    facts: dict[str, Any] = {**machine(first.device)}

    def row(name: str, **values: Any) -> BenchRow:
        words = f"torch {torch.__version__}, {'compiled' if name.endswith('compiled') else 'eager'}"
        return BenchRow(
            network=title, provider=name, backend=words, mode=mode, batch=batch,
            image="x".join(map(str, first.shape[1:])), precision=settings.precision, channels_last=False,
            dtype=str(first.dtype).removeprefix("torch."), rounds=settings.rounds, **values, **facts,
        )  # fmt: skip

    least, times = _least_seconds(work, mode, roofline), 3 if mode == "train" else 1
    rows = []
    for one in timed:
        seconds = one.milliseconds / 1e3
        rate = times * work.operations / 2 / seconds
        rows.append(row(
            one.provider, images_per_second=round(batch / seconds, 3), milliseconds=one.milliseconds,
            lower_quartile=one.lower_quartile, upper_quartile=one.upper_quartile,
            peak_mebibytes=one.peak_mebibytes, gigamacs_per_second=round(rate / 1e9, 4),
            share_of_peak=round(rate / roofline.product.macs, 6), peak_product=roofline.product.name,
            peak_gigamacs_per_second=round(roofline.product.macs / 1e9, 2), error=one.error,
            share_of_roofline=round(least / seconds, 6),
        ))  # fmt: skip
    for name, error in checked.wrong.items():
        rows.append(row(name, status=WRONG, note="it computes something else", error=float(f"{error:.3g}")))
    return [*rows, *(row(name, status=FAILED, note=reason) for name, reason in checked.refused.items())]
