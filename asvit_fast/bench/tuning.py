"""Refining the tiles of Triton kernels for a GPU: what is tuned, the search, the table that it writes.

Only `asvit-fast tune` does this. Models look tiles up (kernels/tile_table.py) and never tune.
"""

from __future__ import annotations

import itertools
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..backends import available, resolve_device, use_backend
from ..errors import InputError
from ..files import to_json, write_atomic
from ..settings import TuneSettings
from .timer import captured, time_graphs
from .workloads import DTYPES, Run, Tiles, Workload

Measure = Callable[[Tiles, Tiles], float | None]  # seconds of the second / of the first; None: it cannot be used

TOLERANCES = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-5}  # of the norm of a difference: another order of summation
CHOICES = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
MARGIN = 0.02  # a candidate that is less than this faster has not won
LIMIT = 24  # candidates of one row
SECONDS = 30.0  # that a row takes for each workload, about: every candidate is compiled for it

# --------------------------------------------------------------------------- what is tuned


@dataclass(frozen=True)
class Task:
    """One row of a table, and what it is timed on."""

    kernel: str
    features: tuple[tuple[str, int], ...]
    workloads: tuple[Workload, ...]

    def __str__(self) -> str:
        return f"{self.kernel} {' '.join(f'{name}={value}' for name, value in self.features)}"


def tasks_of(workloads: Sequence[Workload], dtypes: Sequence[str]) -> list[Task]:
    """A task per row that the workloads look up. It is timed on the largest one of each kind, in the first dtype
    of its bits, and on one workload of each other dtype."""
    rows: dict[tuple[str, tuple], dict[tuple, Workload]] = {}
    for dtype, workload in itertools.product(dtypes, workloads):
        workload = replace(workload, dtype=dtype)
        first = next(name for name in dtypes if torch.finfo(DTYPES[name]).bits == workload.bits)
        for kernel in workload.kernels:
            row = rows.setdefault((kernel, tuple(workload.features(kernel).items())), {})
            kind = (dtype, workload.kind) if dtype == first else (dtype,)
            row[kind] = max(row.get(kind, workload), workload, key=operator.attrgetter("size"))
    return [Task(kernel, features, tuple(row.values())) for (kernel, features), row in rows.items()]


# --------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Found:
    """The end of a search."""

    tiles: Tiles
    speed: float  # relative to what it started from
    tried: int
    refused: int  # that cannot be compiled, or whose result differs


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """One step up or down in one option."""
    for name, choices in CHOICES.items():
        if name in tiles:
            place = min(range(len(choices)), key=lambda index: abs(choices[index] - tiles[name]))
            for index in (place - 1, place + 1):
                if 0 <= index < len(choices):
                    yield tiles | {name: choices[index]}


def refine(
    start: Tiles, measure: Measure, limit: int = LIMIT, report: Callable[[Tiles, Tiles], None] = lambda *_: None
) -> Found:
    """Walk from `start` to a neighbour that is faster until none is, or `limit` were tried.

    Args:
        measure: times a candidate against the best so far, side by side; None refuses it.
        report: told of the candidate and the best before each measurement.
    """
    best, seen, refused = start, [start], 0
    todo = list(neighbours(best))
    while todo and len(seen) <= limit:
        candidate = todo.pop(0)
        if candidate in seen:
            continue
        seen.append(candidate)
        report(candidate, best)
        ratio = measure(best, candidate)
        refused += ratio is None
        if ratio is not None and ratio < 1 - MARGIN:
            best, todo = candidate, list(neighbours(candidate))
    ratio = 1.0 if best == start else measure(start, best)
    if ratio is None or ratio > 1 - MARGIN:  # small gains that were noise do not add up
        best, ratio = start, 1.0
    return Found(best, 1 / ratio, len(seen) - 1, refused)


# --------------------------------------------------------------------------- measuring

Timer = Callable[[Sequence[Run]], list[float]]


def medians_on_gpu(runs: Sequence[Run], rounds: int = 20) -> list[float]:
    """Seconds of each on the GPU, in graphs with a cold L2 cache, so that launches take no time."""
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = {str(index): captured(run, device) for index, run in enumerate(runs)}
    return [timing.median for timing in time_graphs(graphs, device, rounds).values()]


class Comparison:
    """The `Measure` of a task: checks a candidate's results, then times it beside another on all workloads."""

    def __init__(self, task: Task, start: Tiles, batch: int, device: torch.device, timer: Timer) -> None:
        self.task, self.timer = task, timer
        self.runs = [workload.prepare(task.kernel, batch, device) for workload in task.workloads]
        with _poisoned_memory():
            self.expected = [self._with(start, run)() for run in self.runs]

    def _with(self, tiles: Tiles, run: Run) -> Run:
        def call() -> list[Tensor]:
            from asvit_fast.kernels.tile_table import trying

            with trying(self.task.kernel, tiles):
                return run()

        return call

    def __call__(self, best: Tiles, candidate: Tiles) -> float | None:
        ratios = []
        try:
            with _poisoned_memory():
                results = [self._with(candidate, run)() for run in self.runs]
            if not all(map(_agree, self.task.workloads, self.expected, results)):
                return None
            for run in self.runs:
                before, after = self.timer([self._with(best, run), self._with(candidate, run)])
                ratios.append(after / before)
        except Exception as error:
            if not _cannot_run(error):
                raise
            return None
        return statistics.geometric_mean(ratios)


def _agree(workload: Workload, expected: list[Tensor], result: list[Tensor]) -> bool:
    pairs = [(a.double(), b.double()) for a, b in zip(expected, result, strict=True)]
    return all(float((a - b).norm()) <= TOLERANCES[workload.dtype] * float(a.norm()) for a, b in pairs)


def _cannot_run(error: Exception) -> bool:
    """Whether tiles are too large for the GPU or for the compiler; anything else is an error of its own."""
    by_triton = type(error).__module__.startswith("triton") or str(error).startswith("PassManager::run failed")
    return by_triton or isinstance(error, torch.OutOfMemoryError)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN: an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    setting: Any = torch.utils.deterministic
    filled = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setting.fill_uninitialized_memory = filled


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class UserTable:
    """The table of one GPU, in a file that holds whole rows at any time."""

    gpu: str
    path: Path

    @classmethod
    def of(cls, gpu: str) -> UserTable:
        """The table where look-ups on that GPU find it."""
        from asvit_fast.kernels.tile_table import user_table

        return cls(gpu, user_table(gpu))

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of each kernel. InputError, which names the file, if it cannot be used."""
        from asvit_fast.kernels.tile_table import TileTableError, read_table

        try:
            return read_table(self.path) if self.path.exists() else {}
        except TileTableError as error:
            raise InputError(str(error)) from None

    def has(self, task: Task) -> bool:
        """Whether this version of Triton has tuned the row."""
        rows = self.read().get(task.kernel, [])
        return any(_same(row, task) and row.get("tuned", {}).get("triton") == _triton_version() for row in rows)

    def put(self, task: Task, found: Found) -> None:
        """Write the row, in place of the one with the same features."""
        from asvit_fast.kernels.tile_table import forget

        kernels = self.read()
        tuned = {"triton": _triton_version(), "speed": round(found.speed, 3), "tried": found.tried}
        rows = [row for row in kernels.get(task.kernel, []) if not _same(row, task)]
        kernels[task.kernel] = [*rows, dict(task.features) | found.tiles | {"tuned": tuned}]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {self.path.parent}: {error.strerror}; set ASVIT_FAST_TILES") from None
        write_atomic(self.path, _as_text(self.gpu, kernels))
        forget()


def _triton_version() -> str:
    return metadata.version("triton")


def _same(row: Mapping[str, Any], task: Task) -> bool:
    return all(row.get(name) == value for name, value in task.features)


def _as_text(gpu: str, kernels: Mapping[str, list[dict[str, Any]]]) -> str:
    """JSON with a line per row."""
    parts = [
        f"    {to_json(name)}: [\n" + ",\n".join(f"      {to_json(row)}" for row in rows) + "\n    ]"
        for name, rows in kernels.items()
    ]
    return f'{{\n  "gpu": {to_json(gpu)},\n  "kernels": {{\n' + ",\n".join(parts) + "\n  }\n}\n"


# --------------------------------------------------------------------------- all of it


def find_gpu(device: str | torch.device | None) -> torch.device:
    """The GPU to tune for; InputError without one."""
    resolved = resolve_device(device)
    reason = available("window_attention", "triton", resolved)
    if resolved.type != "cuda":
        reason = "torch sees none here" if device is None else f"{str(device)!r} is none"
    if reason is not None:
        raise InputError(f"tiles are tuned on a CUDA GPU, and {reason}; --dry-run shows what would be tuned")
    return resolved


def tune(
    tasks: Sequence[Task],
    table: UserTable,
    device: torch.device,
    batch: int = TuneSettings.batch,
    again: bool = False,
    progress: bool = True,
    timer: Timer = medians_on_gpu,
) -> dict[Task, Found]:
    """Refine the rows of `tasks` and write each into `table` as soon as it is found; those that it has are left out.

    Killed at any moment, the table holds all rows found so far, and the same call goes on with the others.
    """
    from asvit_fast.kernels.tile_table import family_of, nearest

    todo = [task for task in tasks if again or not table.has(task)]
    found: dict[Task, Found] = {}
    with (
        use_backend("triton"),
        torch.cuda.device(device if device.type == "cuda" else -1),  # -1: no GPU, Triton's interpreter
        tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="tune", unit="row", disable=not progress) as bar,
    ):
        for task in todo:
            start = nearest(task.kernel, family_of(device), **dict(task.features))
            measure = Comparison(task, start, batch, device, timer)

            def report(candidate: Tiles, best: Tiles, task: Task = task) -> None:
                bar.set_postfix_str(f"{task}: trying {_short(candidate)}, best {_short(best)}")

            found[task] = refine(start, measure, report=report)
            table.put(task, found[task])
            bar.update()
    return found


def _short(tiles: Tiles) -> str:
    """64x32, 4 warps, 2 stages."""
    blocks = "x".join(str(value) for name, value in tiles.items() if name.startswith("block_"))
    return f"{blocks}{', ' * bool(blocks)}{tiles['num_warps']} warps, {tiles['num_stages']} stages"
