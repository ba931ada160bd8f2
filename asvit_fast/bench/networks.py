"""Benchmarks of networks: providers take turns, are checked before a time counts, and grow their batch until memory
ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..cost import count_macs_of_call, peak_allocation
from ..errors import InputError, first_line
from ..memory import is_out_of_memory, release
from ..models import AsViT
from ..settings import BENCH_MODES, BenchSettings
from ..topology import Topology
from .memory import available_memory
from .providers import Place, Provider, Run, exact, providers, relative_distance, run_torch, tolerance
from .rooflines import product_peak
from .rows import FAILED, OUT_OF_MEMORY, WRONG, BenchRow
from .sources import Source, open_source
from .timer import Timing, compare, machine

Say = Callable[[str], None]


def benchmark(
    model_or_name: str | Path | Topology | nn.Module,
    sample: Any = None,
    batch_sizes: Sequence[int] = BenchSettings.batch_sizes,
    modes: Sequence[str] = BenchSettings.modes,
    against: Sequence[str] = BenchSettings.against,
    *,
    dtype: str = BenchSettings.dtype,
    amp: str | None = BenchSettings.amp,
    compile: bool = BenchSettings.compile,
    channels_last: bool = BenchSettings.channels_last,
    img_size: int | tuple[int, int] | None = BenchSettings.img_size,
    rounds: int = BenchSettings.rounds,
    seed: int = BenchSettings.seed,
    device: str | torch.device | None = BenchSettings.device,
    progress: bool = True,
) -> list[BenchRow]:
    """Measure how fast a network runs here, as its library makes it, through ``accelerate``, and otherwise.

    Every provider has the same weights. Outputs (inference) or gradients of all parameters (train: forward and backward
    of a step, dropout and stochastic depth off) are held against the source in float64 before anything is timed; one
    that is wrong gets a row with its error and no time. Those that are right are timed in turn in this process.

    Args:
        model_or_name: a network; or a topology, the name of a model of timm or torchvision, a run directory, an
            exported folder, a checkpoint, ``hf:NAME`` of transformers (nothing is downloaded), ``module:function``.
        sample: what it is called with, the batch first in every tensor: a tensor, a tuple, or a dict of named inputs.
            By default images of normal noise, as the network takes them. Batches repeat its first eight images.
        batch_sizes: numbers of images, smallest first; the sizes of a provider end where its memory does.
        modes: "inference", "train" or both.
        against: some of "source", "compiled", "sdpa", "sdpa-compiled", "onnxruntime", "openvino", "openvino-f32". The
            last three run inference on a CPU, in the precision that their row names.
        dtype: "fp32", "bf16" or "fp16", of weights and images.
        amp: "bf16" or "fp16": autocast.
        compile: run ours through torch.compile as well.
        channels_last: memory format of weights and images.
        img_size: pixels, a side or (height, width); by default the network's.
        rounds: turns of each provider.
        seed: of weights and images that are drawn.
        device: "cpu", "cuda", ...; by default cuda if there is one.
        progress: show a bar, and say what is left out and why.

    Returns:
        A row for each provider, mode and size: see ``BenchRow``.

    Raises:
        InputError: a network, a sample or a setting that cannot be used.

    Examples:
        >>> import asvit_fast as af
        >>> rows = af.benchmark("test_vit", batch_sizes=1, modes="inference", against="source", progress=False)
        >>> [(row.provider, row.status, row.images_per_second > 0) for row in rows]
        [('source', 'ok', True), ('ours', 'ok', True)]
    """
    given: dict[str, Any] = {"batch_sizes": batch_sizes, "modes": modes, "against": against}
    settings = BenchSettings(
        **given, dtype=dtype, amp=amp, compile=compile, channels_last=channels_last, img_size=img_size, rounds=rounds,
        seed=seed, device=device,
    )  # fmt: skip
    source = open_source(model_or_name, sample, img_size, seed)
    say: Say = tqdm.write if progress else lambda line: None
    return [row for rows in measure(source, settings, say, progress) for row in rows]


def measure(
    source: Source, settings: BenchSettings, say: Say = print, progress: bool = False
) -> Iterator[list[BenchRow]]:
    """The rows of every case, a mode and a size, as soon as it is measured. Inference comes first: a step of training
    may change what batch norms remember."""
    place = Place.of(settings)
    table, reasons = providers(source, settings, place)
    for name, reason in reasons.items():
        say(f"{source.name}: {name} left out, {reason}")
    modes, sizes = [mode for mode in BENCH_MODES if mode in settings.modes], sorted(set(settings.batch_sizes))
    run = _Sweep(source, settings, place, say)
    total, hidden = len(modes) * len(sizes), None if progress else True  # None: hidden where nobody watches
    with tqdm(total=total, desc=source.name, unit="case", disable=hidden, leave=False) as bar:
        for mode in modes:
            able = [provider for provider in table if mode in provider.modes]
            for provider in table:
                if provider not in able:
                    say(f"{source.name}: {provider.name} is for {', '.join(provider.modes)}, not for {mode}")
            for size in sizes:
                if able:
                    bar.set_postfix_str(f"{mode}, batch {size}")
                    rows = run.case(mode, size, able)
                    ended = {row.provider for row in rows if row.status in (OUT_OF_MEMORY, FAILED)}
                    able = [provider for provider in able if provider.name not in ended]
                    yield rows
                bar.update()


class _OutOfMemory(Exception):
    """Memory has run out while a provider was timed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class _Sweep:
    """One network through all its cases."""

    def __init__(self, source: Source, settings: BenchSettings, place: Place, say: Say) -> None:
        self.source, self.settings, self.place, self.say = source, settings, place, say
        self.machine: dict[str, Any] = {**machine(place.device)}
        self.measured: dict[tuple[str, str], tuple[int, int]] = {}  # by provider and mode: a size, and its bytes
        self.rounding: dict[str, float] = {}  # by mode: the source's own distance from float64
        self.exact = functools.lru_cache(maxsize=1)(functools.partial(exact, source))

    def case(self, mode: str, size: int, table: Sequence[Provider]) -> list[BenchRow]:
        """Check every provider, then time those that are right in turn."""
        if any(provider.name.endswith("compiled") for provider in table):
            torch.compiler.reset()  # what other cases have compiled counts against the limits of this one
        rows: dict[str, BenchRow] = {}
        runs: dict[str, Run] = {}
        memory: dict[str, int | None] = {}
        for provider in table:
            rows[provider.name], run = self._checked(provider, mode, size, memory)
            if run is not None:
                runs[provider.name] = run
        for name, timing in self._timed(runs, rows).items():
            rows[name] = self._with_time(rows[name], next(p for p in table if p.name == name), timing, memory[name])
        return list(rows.values())

    def _checked(
        self, provider: Provider, mode: str, size: int, memory: dict[str, int | None]
    ) -> tuple[BenchRow, Run | None]:
        """A row with the error, and the call to time; None where there is nothing to time."""
        row = self._row(provider, mode, size)
        name = provider.name
        try:
            missing = self._missing(provider, mode, size)
            if missing is not None:
                return replace(row, status=OUT_OF_MEMORY, note=missing), None
            distance, run = self._distance(provider, mode, size)
            row = replace(row, error=float(f"{distance:.3g}"))
            allowed = self._allowed(provider, mode, distance)
            if not distance < allowed:
                note = f"relative error {distance:.1e} against float64, allowed is {allowed:.0e}"
                return replace(row, status=WRONG, note=note), None
            memory[name] = peak = peak_allocation(run, self.place.device) if provider.seen else None
            if peak:
                self.measured[name, mode] = size, peak
            return row, run
        except Exception as error:  # compilers and exporters raise anything
            kind = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            row = replace(row, status=kind, note=f"{name}{first_line(error)}"[:300])
        release()  # outside the handler, so that the tensors of the attempt are free
        return row, None

    def _allowed(self, provider: Provider, mode: str, distance: float) -> float:
        """The distance that is still rounding: where a network is so ill conditioned that the source itself is farther
        off, twice its own; more than ten times what is common is none."""
        if provider.name == "source" and math.isfinite(distance):
            self.rounding[mode] = distance
        common = tolerance(provider.precision, self.place.device)
        return max(common, min(2 * self.rounding.get(mode, 0.0), 10 * common))

    def _distance(self, provider: Provider, mode: str, size: int) -> tuple[float, Run]:
        """How far a provider is from float64, and the call that was made to know it."""
        of = self.source.sample.distinct(size)
        want = self.exact(mode, of, self.place.device)
        run = provider.prepare(mode, self.source.sample.batch(size, of, self.place.tensor))
        got = run()
        if mode == "inference":
            want = [_repeated(a, b, of, size) for a, b in zip(want, got, strict=True)]
        return relative_distance(got, want), run

    def _missing(self, provider: Provider, mode: str, size: int) -> str | None:
        """On a CPU the system kills whoever takes too much: why the batch is not tried."""
        available = available_memory(self.place.device)
        if available is None:
            return None
        before, peak = self.measured.get((provider.name, mode)) or self._source_memory(mode)
        fixed = 0  # bytes that do not grow with the batch
        if mode == "train":
            fixed = min(peak, sum(p.numel() * p.element_size() for p in self.source.model.parameters()))  # gradients
        needed = fixed + (peak - fixed) * size / before
        if needed <= available:
            return None
        return f"about {needed / 2**30:.1f} GiB are needed, {available / 2**30:.1f} GiB are available"

    def _source_memory(self, mode: str) -> tuple[int, int]:
        """A few images, and the bytes that they take in the source: for providers that were not measured yet. Two are
        trained on, as batch norms need them."""
        if ("", mode) not in self.measured:
            model, place, images = self.source.model, self.place, 1 + (mode == "train")
            sample = self.source.sample.batch(images, self.source.sample.distinct(images), place.tensor)
            run = run_torch(model, place, isinstance(model, AsViT), mode, sample)
            self.measured["", mode] = images, peak_allocation(run, place.device)
        return self.measured["", mode]

    def _timed(self, runs: dict[str, Run], rows: dict[str, BenchRow]) -> dict[str, Timing]:
        """Times of all; one whose memory runs out now gets a row that says so, and the others are timed again."""

        def named(name: str, run: Run) -> Run:
            def call() -> list[Tensor]:
                try:
                    return run()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise _OutOfMemory(name, first_line(error)) from None

            return call

        while runs:
            try:
                calls = {name: named(name, run) for name, run in runs.items()}
                return compare(calls, self.place.device, self.settings.rounds)
            except _OutOfMemory as error:
                del runs[error.name]
                rows[error.name] = replace(rows[error.name], status=OUT_OF_MEMORY, note=str(error))
            release()
        return {}

    def _row(self, provider: Provider, mode: str, size: int) -> BenchRow:
        return BenchRow(
            network=self.source.name, provider=provider.name, backend=provider.backend, mode=mode, batch=size,
            image=self.source.sample.shape, precision=self.settings.precision,
            channels_last=self.settings.channels_last, dtype=provider.dtype, **self.machine,
        )  # fmt: skip

    def _with_time(self, row: BenchRow, provider: Provider, timing: Timing, memory: int | None) -> BenchRow:
        median, lower, upper = timing.milliseconds
        peak = product_peak(provider.precision, self.place.device, torch.get_num_threads())
        macs = self.macs
        rate = None if macs is None else macs * row.batch * (3 if row.mode == "train" else 1) / timing.median
        return replace(
            row,
            images_per_second=round(row.batch / timing.median, 3),
            milliseconds=median,
            lower_quartile=lower,
            upper_quartile=upper,
            rounds=timing.rounds,
            peak_mebibytes=None if memory is None else round(memory / 2**20, 1),
            gigamacs_per_second=None if rate is None else round(rate / 1e9, 4),
            share_of_peak=None if rate is None else round(rate / peak.macs, 6),
            peak_gigamacs_per_second=round(peak.macs / 1e9, 2),
            peak_product=peak.name,
        )

    @functools.cached_property
    def macs(self) -> int | None:
        """Multiply-adds of one image; None for a network that cannot be counted without being run."""
        sample = self.source.sample.batch(1, 1, lambda x: x)
        try:
            return sample.call(functools.partial(count_macs_of_call, self.source.model))
        except Exception as error:  # of any network
            self.say(f"{self.source.name}: its multiply-adds cannot be counted: {first_line(error)}")
            return None


def _repeated(want: Tensor, got: Tensor, of: int, size: int) -> Tensor:
    """What a batch gives that repeats its first ``of`` images, in a tensor whose first axis goes with the batch."""
    if want.shape == got.shape or want.ndim == 0 or got.shape[0] * of != want.shape[0] * size:
        return want
    index = torch.arange(size, device=want.device) % of  # [size]
    return want.unflatten(0, (of, -1))[index].flatten(0, 1)  # windows of an image follow each other
