"""Registers, stack, spills and shared memory of CUDA and Triton kernels, compiled for GPUs that need not be there.

    python benchmarks/resource_report.py [--archs 80,90,100] [--sources NAME ...]

CUDA kernels through nvcc (CUDA_HOME, or the one on PATH), GELU's Triton kernel through Triton's own compiler.
The exit code is 1 if any kernel spills registers, 2 if there is nothing to compile with.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100)  # Ampere, Hopper, Blackwell
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What one kernel uses on one architecture; bytes per thread, but for shared memory, which is per block."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def cuda_usage(nvcc: str, source: Path, arch: int) -> list[Usage]:
    """Every kernel of one .cu file; RuntimeError, with the compiler's words, if it does not compile."""
    command = [nvcc, "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
    result = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{result.stdout}{result.stderr}")
    return parse(result.stdout + result.stderr, arch)


def parse(text: str, arch: int) -> list[Usage]:
    """What `ptxas -v` says of every kernel."""
    found = list(PTXAS.finditer(text))
    return [_usage(match, name, arch) for match, name in zip(found, demangle(m["name"] for m in found), strict=True)]


def _usage(match: re.Match[str], name: str, arch: int) -> Usage:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    numbers = (int(match[key]) for key in ("registers", "stack", "stores", "loads"))
    return Usage(name, arch, *numbers, int(shared[1]) if shared else 0)


def demangle(names: Iterable[str]) -> list[str]:
    """kernel<template arguments>, without namespaces and parameters; mangled where there is no c++filt."""
    names = list(names)
    if shutil.which("c++filt") is None or not names:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = (
        re.sub(r"asvit_fast::|\(anonymous namespace\)::|^void |\((?:int|bool)\)", "", line) for line in text.split("\n")
    )
    return [line.rpartition(">(")[0] + ">" if ">(" in line else line for line in plain if line]


def triton_usage(arch: int) -> Iterator[Usage]:
    """Every variant of GELU's Triton kernel, for float32 and bfloat16."""
    from asvit_fast.kernels.gelu_taylor import BLOCK, OPTIONS, gelu_taylor_kernel
    from asvit_fast.kernels.inspection import compile_kernel

    for dtype, orders, tanh, biased in itertools.product(("fp32", "bf16"), (0, 1, 2), (False, True), (False, True)):
        pointers = {f"{name}_pointer": f"*{dtype}" for name in ("input", "output", "bias")}
        constants = {"ORDERS": orders, "TANH": tanh, "BIASED": biased, "BLOCK": BLOCK}
        types = pointers | {"count": "i64", "channels": "i64"}
        report = compile_kernel(gelu_taylor_kernel, types, constants, arch, **OPTIONS)
        name = f"{report.name}<{dtype}, ORDERS={orders}, TANH={tanh}, BIASED={biased}> (Triton)"
        spilled = report.spilled_bytes  # stores and loads are not told apart
        yield Usage(name, arch, report.registers, spilled, spilled, spilled, report.shared_bytes)


def table(usages: Iterable[Usage]) -> str:
    """One line per kernel and architecture."""
    lines = [f"{'arch':>6} {'registers':>9} {'stack':>6} {'spill st':>8} {'spill ld':>8} {'shared':>7}  kernel"]
    for use in sorted(usages, key=lambda use: (use.kernel, use.arch)):
        numbers = f"{use.registers:>9} {use.stack_bytes:>6} {use.spill_store_bytes:>8} {use.spill_load_bytes:>8}"
        lines.append(f"sm_{use.arch:<3} {numbers} {use.shared_bytes:>7}  {use.kernel}{'  SPILLS' * use.spills}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; the exit code says whether anything spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="compute capabilities, e.g. 80,90")
    parser.add_argument("--sources", nargs="*", metavar="NAME", help="stems of csrc/cuda/*.cu; all by default")
    arguments = parser.parse_args()
    archs = [int(arch) for arch in arguments.archs.split(",")]
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is missing: set CUDA_HOME to a CUDA toolkit, or put its bin folder on PATH", file=sys.stderr)
        return 2
    sources = [s for s in sorted(ROOT.glob("csrc/cuda/*.cu")) if not arguments.sources or s.stem in arguments.sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: cuda_usage(nvcc, *job), itertools.product(sources, archs))
        usages = [use for usages in compiled for use in usages]
    if not arguments.sources:
        usages += [use for arch in archs for use in triton_usage(arch)]
    print(table(usages))
    spilling = sum(use.spills for use in usages)
    print(f"{len(usages) // len(archs)} kernels on {len(archs)} architectures, {spilling} with spills")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
