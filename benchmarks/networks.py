"""Helpers of the benchmarks of whole networks: settings, providers, the check before the clock, rows."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asvit_fast import AsViT, create_model
from asvit_fast.bench.timer import Row, Timing, compare, machine, print_rows
from asvit_fast.topology import NAMED_TOPOLOGIES, Topology

Run = Callable[[], Any]  # -> a tensor or a tuple of tensors

SEED_TOPOLOGY = NAMED_TOPOLOGIES["asvit_seed"]
THETAS = 10


@dataclass(frozen=True)
class Settings:
    """Settings. ``rounds`` are turns per provider, ``long_rounds`` those of work that takes many seconds."""

    device: torch.device
    topology: Topology = field(default_factory=lambda: Topology.parse(SEED_TOPOLOGY))
    img_size: int = 224
    batch: int = 16  # images of the NTK
    repeats: int = 5  # networks of a topology
    steps: int = 20  # of the search
    rounds: int = 5
    long_rounds: int = 3
    without: tuple[str, ...] = ()  # providers with one of these words in their name do not take part
    keeps_memory: bool = False  # the process keeps memory that is freed, as our commands let it

    def network(self, norm: str, dtype: torch.dtype = torch.float32) -> AsViT:
        """The same float32 weights on every call."""
        torch.manual_seed(0)
        model = create_model(self.topology, img_size=self.img_size, num_classes=0, norm=norm)
        return model.to(self.device, dtype).eval()


@dataclass(frozen=True)
class NetworkRow(Row):
    """A row with what it depends on besides the machine. ``note``: what a reader must know about the provider."""

    topology: str
    rounds: int
    note: str

    @classmethod
    def of_network(
        cls, settings: Settings, case: str, provider: str, timing: Timing, error: float, note: str
    ) -> NetworkRow:
        row = Row.of(
            "scores",
            f"{case}, {settings.img_size} px{', freed memory kept' if settings.keeps_memory else ''}",
            provider,
            timing,
            0,
            error,
        )
        return cls(**asdict(row), topology=str(settings.topology), rounds=timing.rounds, note=note)


class Providers:
    """Who takes part in a case, by name, ready to run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs: dict[str, Run] = {}
        self.notes: dict[str, str] = {}
        torch.compiler.reset()  # what the case before has compiled counts against limits of this one

    def add(self, name: str, run: Run, note: str = "") -> None:
        """One that runs as it is."""
        if not self._excluded(name):
            self.runs[name], self.notes[name] = run, note

    def add_compiled(self, name: str, make: Callable[[], Run], note: str = "") -> None:
        """One that is compiled first, and left out with the reason where that fails; its first run is not timed."""
        if self._excluded(name):
            return
        start = time.perf_counter()
        try:
            run = make()
            run()
        except Exception as error:  # a compiler raises anything
            reason = next(iter(str(error).splitlines()), "")[:100]
            print(f"{name}: left out, {type(error).__name__}: {reason}", flush=True)
            return
        first = f"{time.perf_counter() - start:.1f} s until the end of the first run, not counted"
        self.add(name, run, "; ".join(filter(None, (note, first))))

    def rows(self, case: str, expected: Any, tolerance: float, rounds: int) -> list[NetworkRow]:
        """Check every provider, then time them in turn.

        Raises SystemExit if one is wrong; nothing is timed then.
        """
        errors = {name: error(run(), expected) for name, run in self.runs.items()}
        reject(case, errors, tolerance)
        timings = compare(self.runs, self.settings.device, max(rounds, 2))  # quartiles take two
        return [
            NetworkRow.of_network(self.settings, case, name, timing, errors[name], self.notes[name])
            for name, timing in timings.items()
        ]

    def _excluded(self, name: str) -> bool:
        return any(word in name for word in self.settings.without)


def reject(case: str, errors: dict[str, float], tolerance: float) -> None:
    """End the program if an error is above the tolerance (or no number)."""
    wrong = {name: value for name, value in errors.items() if not value <= tolerance}
    if wrong:
        raise SystemExit(f"{case}: wrong results, no time recorded: {wrong}")


def error(got: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Largest deviation of any tensor, relative to the largest value of that tensor."""
    pairs = [(got, expected)] if isinstance(expected, Tensor) else zip(got, expected, strict=True)
    return max(((a.cpu().double() - b.cpu()).abs().max() / b.cpu().abs().max()).item() for a, b in pairs)


def summary(seconds: list[float]) -> Timing:
    """Median and quartiles of measured seconds; a single one is all three."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive") if seconds[1:] else 3 * seconds
    return Timing(median, lower, upper, len(seconds))


def check_table(path: Path | None, device: torch.device) -> None:
    """End the program before anything runs if rows do not fit the columns of an existing file."""
    if path is None or not path.exists():
        return
    with path.open(newline="") as file:
        columns = next(csv.reader(file), [])
    if columns != [*(column.name for column in fields(NetworkRow)), *machine(device)]:
        raise SystemExit(f"{path} has other columns ({', '.join(columns)}): remove it, or name another file with --csv")


def show(rows: list[NetworkRow]) -> None:
    """Print every case with speeds relative to its slowest provider, and the notes."""
    for case in dict.fromkeys(row.case for row in rows):
        part = [row for row in rows if row.case == case]
        print_rows(part, baseline=max(part, key=lambda row: row.milliseconds).provider)
        for row in part:
            print(f"  {row.provider}: rounds {row.rounds}{f'; {row.note}' if row.note else ''}")
        print(flush=True)
