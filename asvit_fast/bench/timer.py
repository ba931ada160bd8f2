"""The one timer of all benchmarks: candidates take turns, medians with quartiles, the machine beside the numbers."""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _extension
from ..cuda_capture import capturing
from ..environment import installation
from ..errors import first_line
from ..machine import processor

FLUSHED = 1 << 28  # bytes, more than the L2 cache of any GPU holds


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Median, lower and upper quartile."""
        median, lower, upper = (round(1e3 * x, 4) for x in (self.median, self.lower_quartile, self.upper_quartile))
        return median, lower, upper

    @property
    def spread(self) -> float:
        """Interquartile range relative to the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median


def compare(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 30, minimum_seconds: float = 2e-3
) -> dict[str, Timing]:
    """Time callables in turn (A B C, A B C, ...), so that clocks, heat and neighbours hit all of them alike.

    A turn repeats its callable until `minimum_seconds` have passed; on CUDA it ends with a synchronisation. Python's
    garbage is collected between the turns, never in one; what was there before is not searched each time.
    """
    repeats = {name: _calibrate(run, device, minimum_seconds) for name, run in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    enabled, others = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in candidates.items():
                gc.collect()
                seconds[name].append(_measure(run, device, repeats[name]))
    finally:
        if not others:
            gc.unfreeze()
        if enabled:
            gc.enable()
    return {name: _summary(values) for name, values in seconds.items()}


def best_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """The least of a few calls, after one that does not count: what a machine can do, where others disturb it."""
    run()
    return min(_measure(run, device, 1) for _ in range(rounds))


def _measure(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _calibrate(run: Callable[[], Any], device: torch.device, minimum_seconds: float) -> int:
    """Calls per turn; the first calls also warm up compilers, caches and memory pools."""
    for _ in range(2):
        run()
    return max(1, round(minimum_seconds / max(_measure(run, device, 1), 1e-9)))


def _summary(values: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, lower, upper, len(values))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------- graphs


def compare_replayed(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 30
) -> dict[str, Timing]:
    """Time callables as CUDA graphs with a cold L2 cache: what the GPU takes for them, without the host's part.

    One that cannot be captured is left out, and the reason printed. On a CPU there are no graphs, and no times.
    """
    if device.type != "cuda":
        return {}
    graphs = {}
    for name, run in candidates.items():
        try:
            graphs[name] = captured(run, device)
        except RuntimeError as error:
            print(f"{name}: no graph, {first_line(error)[:110]}", flush=True)
    return time_graphs(graphs, device, rounds)


def captured(run: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call. Raises RuntimeError for a call that waits for the GPU, before anything is captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what a call keeps for a backward pass belongs to the stream of its capture
        for _ in range(2):  # compilers, libraries' work spaces
            run()
        with _waiting_is_an_error():
            run()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """A capture that fails leaves the memory of its pool behind."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def time_graphs(graphs: Mapping[str, torch.cuda.CUDAGraph], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Seconds of a replay by CUDA events, in turn, each behind a write of more than the L2 cache holds."""
    cache = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    turns = [{name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in graphs} for _ in range(rounds)]
    with torch.cuda.device(device):
        for events in turns:
            for name, (start, end) in events.items():
                cache.zero_()
                start.record()
                graphs[name].replay()
                end.record()
    torch.cuda.synchronize(device)
    return {name: _summary([turn[name][0].elapsed_time(turn[name][1]) / 1e3 for turn in turns]) for name in graphs}


# --------------------------------------------------------------------------- rows


def machine(device: torch.device) -> dict[str, str]:
    """Facts that a figure depends on besides the code: the machine, versions, threads, the commit."""
    versions = installation()["versions"]
    extension = _extension.extension()
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "isa": extension.get_isa() if extension else "none",
        "python": platform.python_version(),
        "torch": versions["torch"],
        "triton": versions["triton"] or "none",
        "asvit_fast": versions["asvit-fast"] or "source tree",
        "commit": _commit(),
    }


@functools.cache
def _commit() -> str:
    """The commit of a checkout; "none" of an installed package."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return "none"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Row:
    """One figure: what was run, by whom, how long it took, how exact it was.

    ``milliseconds`` are of calls as a program makes them; ``replay_milliseconds`` of a GPU that replays them as a
    graph, with a cold L2 cache.
    """

    benchmark: str
    case: str
    provider: str
    milliseconds: float
    lower_quartile: float
    upper_quartile: float
    gigabytes_per_second: float
    error: float
    replay_milliseconds: float | None = field(default=None, kw_only=True)

    @classmethod
    def of(
        cls,
        benchmark: str,
        case: str,
        provider: str,
        timing: Timing,
        moved_bytes: int,
        error: float,
        replay: Timing | None = None,
    ) -> Row:
        """A row from seconds and the bytes that the work has to read and write at least."""
        rate = round(moved_bytes / timing.median / 1e9, 2)
        replayed = None if replay is None else replay.milliseconds[0]
        values = (benchmark, case, provider, *timing.milliseconds, rate, float(f"{error:.2e}"))
        return cls(*values, replay_milliseconds=replayed)

    @property
    def replay_text(self) -> str:
        """Milliseconds of the replay for a table; empty without one."""
        return "" if self.replay_milliseconds is None else f"{self.replay_milliseconds:.4f}"


def print_header(device: torch.device) -> None:
    """Print the machine above the table."""
    print("  ".join(f"{name}: {value}" for name, value in machine(device).items()))


def print_rows(rows: list[Row], baseline: str) -> None:
    """Print a table, with each provider's speed relative to `baseline` on the same case."""
    reference = {row.case: row.milliseconds for row in rows if row.provider == baseline}
    print(
        f"{'case':34} {'provider':28} {'ms':>9} {'quartiles':>19} {'replay':>8} {'GB/s':>8} {'error':>9} {'speed':>7}"
    )
    for row in rows:
        quartiles = f"{row.lower_quartile:.3f} .. {row.upper_quartile:.3f}"
        speed = f"{reference[row.case] / row.milliseconds:6.2f}x" if row.case in reference else ""
        print(
            f"{row.case:34} {row.provider:28} {row.milliseconds:9.3f} {quartiles:>19} "
            f"{row.replay_text:>8} {row.gigabytes_per_second:8.1f} {row.error:9.1e} {speed:>7}"
        )


def save_rows(path: Path, rows: list[Row], device: torch.device) -> None:
    """Append rows with the machine to a CSV file, writing the header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) | machine(device) for row in rows]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        if new:
            writer.writeheader()
        writer.writerows(records)
