"""Resources and inner loop of every CUDA and Triton kernel, compiled for GPUs that need not be there.

    python benchmarks/kernel_report.py [--arch 80,90,100] [--dtype bf16,fp32] [--kernel NAME ...] [--shape TEXT ...]

Triton kernels on the shapes of real networks (triton_cases.py), csrc/cuda/*.cu through nvcc (CUDA_HOME, or PATH's).
Rows go to a table and to --out, where they replace those of the same kernel, shape, dtype and arch.

The inner loop: of the innermost loops (a branch back to an instruction that every way to it passes) the one with the
most MUFU, then one that copies ahead, then the most instructions that are not "other"; both sides of a condition
count. "issue": picoseconds per score or byte on the whole GPU if its schedulers did nothing but issue that loop; tails
and what is outside of the loop come on top. "exp", "tensor" and "memory": what the score or byte takes at least
(rooflines.py has rates and sources).

The exit code is 1 if a kernel spills registers on sm_90, more than a few outside of its inner loop, 2 if there is
nothing to compile with.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cuda_sources
import triton_cases
from kernel_inspection import CLASSES, Instruction, KernelReport, disassemble, inner_loop
from rooflines import GPUS, Work, bounds, occupancy

RESULTS = Path(__file__).parent / "results" / "kernel_report.csv"
GATED = 90  # sm_90: where a spill is a failure
FEW = 16  # bytes outside of the inner loop, which no timing shows: attention's backward pass of 784 tokens, on an H100


@dataclass(frozen=True)
class Row:
    """One kernel, compiled once. Bytes are per thread, but for shared memory, which is per block."""

    kernel: str
    shape: str
    dtype: str
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int  # per block
    occupancy: float  # share of a multiprocessor's warp slots
    instructions: int  # of the inner loop, per warp and round
    tensor: int
    mufu: int
    fp32: int
    shared_access: int
    global_access: int
    local_access: int
    other: int
    unit: str
    units: float  # that a block does per round
    issue_ps: float
    pipes_ps: float
    exp_ps: float
    tensor_ps: float
    memory_ps: float
    times_roofline: float  # issue / the largest of the last three
    loop: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.kernel, self.shape, self.dtype, str(self.arch))

    @property
    def spills(self) -> bool:
        """In the inner loop, or more than a few bytes."""
        return self.local_access > 0 or self.spilled > FEW


def row_of(kernel: str, shape: str, dtype: str, report: KernelReport, body: list[Instruction], work: Work) -> Row:
    """The figures of one compiled kernel."""
    gpu, loop = GPUS[report.capability], inner_loop(body)
    if not work.units:  # what a round moves is known from its instructions
        moved = loop.global_bytes * report.warps  # nothing where the loop is one over shared memory
        work = Work(work.unit, float(moved), bytes=float(moved > 0))
    limits = bounds(gpu, loop, report.warps, work, dtype in ("bf16", "fp16"))
    full = occupancy(gpu, report.registers, report.shared_bytes, report.warps) if report.warps else 0.0
    times = limits.issue / limits.roofline if limits.roofline else 0.0
    picoseconds = (limits.issue, limits.pipes, limits.exponential, limits.tensor, limits.memory, times)
    return Row(
        kernel, shape, dtype, report.capability, report.registers, report.spilled_bytes, report.shared_bytes,
        report.warps, round(full, 3), loop.instructions, *(loop.mix[name] for name in (*CLASSES, "other")),
        work.unit, work.units, *(float(f"{value:.3g}") for value in picoseconds), loop.found,
    )  # fmt: skip


# --------------------------------------------------------------------------- compiling


def triton_rows(case: triton_cases.Case) -> list[Row]:
    """The row of one case."""
    report = case.launch.compile(case.arch)
    if report.stack_pointer_uses:
        raise RuntimeError(f"{case.kernel} {case.label} {case.dtype} sm_{case.arch} computes with the stack pointer")
    body = disassemble(report.cubin)[case.launch.name]
    return [row_of(case.kernel, case.label, case.dtype, report, body, case.work())]


def cuda_rows(nvcc: str, source: Path, arch: int) -> list[Row]:
    """A row for every kernel of a .cu file; the unit is a score, or a byte of global memory that the loop names."""
    return [
        row_of(report.name, source.name, "", report, body, cuda_sources.work_of(report, inner_loop(body)))
        for report, body in cuda_sources.compile_source(nvcc, source, arch)
    ]


def collect(cases: list[triton_cases.Case], sources: list[tuple[str, Path, int]], jobs: int) -> Iterator[Row]:
    """All rows, as they are done, in `jobs` processes; how far it is on stderr."""
    calls = [partial(cuda_rows, *source) for source in sources] + [partial(triton_rows, case) for case in cases]
    with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        done = (
            (call() for call in calls) if pool is None else (f.result() for f in as_completed(map(pool.submit, calls)))
        )
        for number, rows in enumerate(done, start=1):
            print(f"\r{number} of {len(calls)} compiled", end="", file=sys.stderr, flush=True)
            yield from rows
        print(file=sys.stderr)


# --------------------------------------------------------------------------- output


def table(rows: Iterable[Row]) -> str:
    """One line per row; picoseconds per unit in the last columns."""
    lines = [
        f"{'kernel':31} {'shape':20} {'dtype':5} {'arch':6} {'regs':>4} {'spill':>5} {'shared':>6} {'warps':>5} "
        f"{'occ':>4} | {'loop':>5} {'tensor':>6} {'mufu':>4} {'fp32':>5} {'LDS':>4} {'LDG':>4} {'LDL':>3} {'other':>5}"
        f" | {'unit':5} {'issue':>7} {'exp':>6} {'tensor':>6} {'memory':>6} {'times':>6}"
    ]
    for r in rows:
        line = (
            f"{r.kernel:31} {r.shape:20} {r.dtype:5} sm_{r.arch:<3} {r.registers:>4} {r.spilled:>5} {r.shared:>6} "
            f"{r.warps:>5} {r.occupancy:>4.0%} | {r.instructions:>5} {r.tensor:>6} {r.mufu:>4} {r.fp32:>5} "
            f"{r.shared_access:>4} {r.global_access:>4} {r.local_access:>3} {r.other:>5} | {r.unit:5} "
            f"{r.issue_ps:>7.3g} {r.exp_ps:>6.3g} {r.tensor_ps:>6.3g} {r.memory_ps:>6.3g} {r.times_roofline:>5.1f}x"
        )
        lines.append(line + "  SPILLS" * r.spills)
    return "\n".join(lines)


def save(path: Path, rows: list[Row]) -> None:
    """Into a CSV file, in place of its rows of the same kernels, shapes, dtypes and archs."""
    names = [field.name for field in fields(Row)]
    records = {row.key: {name: str(value) for name, value in asdict(row).items()} for row in rows}
    if path.exists():
        with path.open(newline="") as file:
            old = [record for record in csv.DictReader(file) if list(record) == names]
        records = {
            tuple(record[name] for name in ("kernel", "shape", "dtype", "arch")): record for record in old
        } | records
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records[key] for key in sorted(records))


def conclusion(rows: list[Row]) -> str:
    """How many, where the rates come from, and what spills."""
    lines = [f"{len(rows)} kernels compiled; {len({r.kernel for r in rows})} different ones"]
    for arch in sorted({row.arch for row in rows}):
        gpu, spilling = GPUS[arch], [row for row in rows if row.arch == arch and row.spills]
        lines.append(f"sm_{arch}: {len(spilling)} spill; rates of {gpu.name}: {gpu.source}")
        lines += [f"  {row.kernel} {row.shape} {row.dtype}: {row.spilled} bytes per thread" for row in spilling]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code says whether anything spills where it must not."""
    options = _parse(argv)

    def wanted(*names: str) -> bool:
        return not options.kernel or any(name.startswith(kernel) for kernel in options.kernel for name in names)

    def shaped(label: str) -> bool:
        return not options.shape or any(set(text.split()) <= set(label.split()) for text in options.shape)

    archs = [int(arch) for arch in options.arch.split(",")]
    cases = list(triton_cases.cases(archs, options.dtype.split(","), shaped))
    cases = [case for case in cases if wanted(case.kernel)]
    sources = [] if options.shape else [path for path in cuda_sources.sources() if wanted(path.name, path.stem)]
    nvcc = cuda_sources.find_nvcc()
    if sources and nvcc is None:
        print("nvcc is missing: set CUDA_HOME to a CUDA toolkit, or put its bin folder on PATH", file=sys.stderr)
        return 2
    jobs = [(str(nvcc), source, arch) for source in sources for arch in archs]
    if not cases and not jobs:
        every = list(triton_cases.cases(archs[:1], ["bf16"]))
        kernels = [*dict.fromkeys(case.kernel for case in every), *(path.name for path in cuda_sources.sources())]
        shapes = dict.fromkeys(case.label for case in every)
        print(f"nothing is --kernel {options.kernel} --shape {options.shape}", file=sys.stderr)
        print(f"kernels begin with: {', '.join(kernels)}", file=sys.stderr)
        print(f"shapes (triton_cases.py): {', '.join(shapes)}", file=sys.stderr)
        return 2
    rows = sorted(collect(cases, jobs, options.jobs), key=lambda row: (row.kernel, row.dtype, row.arch, row.shape))
    print(table(rows))
    print(conclusion(rows))
    if options.out:
        save(Path(options.out), rows)
    return int(any(row.spills for row in rows if row.arch == GATED))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90", help="80 (Ampere), 90 (Hopper), 100 (Blackwell), or several: 80,90")
    parser.add_argument("--dtype", default="bf16", help="of Triton kernels: bf16, fp16, fp32, or several: bf16,fp32")
    parser.add_argument("--kernel", nargs="*", metavar="NAME", help="beginnings of names: Triton kernels, .cu files")
    parser.add_argument("--shape", nargs="*", metavar="TEXT", help="what shapes must have: 'N=49 d=8' N=784")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", default=str(RESULTS), help="CSV file; empty: none")
    options = parser.parse_args(argv)
    for name, known in (("arch", [str(arch) for arch in GPUS]), ("dtype", ["bf16", "fp16", "fp32"])):
        unknown = [value for value in getattr(options, name).split(",") if value not in known]
        if unknown:
            parser.error(f"--{name} must be some of {', '.join(known)}, got {unknown[0]}")
    return options


if __name__ == "__main__":
    sys.exit(main())
