"""Compiles csrc/cuda/*.cu with nvcc for GPUs that need not be there, reads what each kernel uses, counts its work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kernel_inspection import Instruction, KernelReport, Loop, block_threads, disassemble
from rooflines import Work

ROOT = Path(__file__).resolve().parent.parent
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
Compiled = tuple[KernelReport, list[Instruction]]
TENSOR_KERNEL = re.compile(r"window_attention_taylor_tensor_kernel<(\d), (\d+)>")  # orders, dim
SCALAR_KERNEL = re.compile(r"window_attention_taylor_kernel<float, \d, (\d+), (\d+)>")  # width, lanes of a query


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def sources() -> list[Path]:
    """Every .cu file."""
    return sorted(ROOT.glob("csrc/cuda/*.cu"))


def compile_source(nvcc: str, source: Path, arch: int) -> list[Compiled]:
    """Every kernel of one .cu file; RuntimeError, with the compiler's words, if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-O3", "-std=c++17", "-I", str(ROOT / "csrc"), "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
        result = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{result.stdout}{result.stderr}")
        code = cubin.read_bytes()
    bodies, threads = disassemble(code), block_threads(code)
    reports = parse(result.stdout + result.stderr, arch, threads)
    return [(report, bodies[name]) for name, report in reports.items()]


def parse(text: str, arch: int, threads: dict[str, int]) -> dict[str, KernelReport]:
    """Figures of `ptxas -v` for every kernel, by mangled name; `threads` of its blocks. A stack frame is no spill."""
    found = {match["name"]: match for match in PTXAS.finditer(text)}
    return {
        mangled: _report(found[mangled], name, arch, threads.get(mangled, 0))
        for mangled, name in zip(found, demangle(found), strict=True)
    }


def _report(match: re.Match[str], name: str, arch: int, threads: int) -> KernelReport:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    spilled = max(int(match["stores"]), int(match["loads"]))
    shared_bytes = int(shared[1]) if shared else 0
    return KernelReport(name, arch, int(match["registers"]), spilled, shared_bytes, -(-threads // 32), b"")


def work_of(report: KernelReport, loop: Loop) -> Work:
    """What a block does per round of its loop: scores where windowed attention loops over keys, else bytes."""
    if tensor := TENSOR_KERNEL.fullmatch(report.name):
        orders, dim = int(tensor[1]), int(tensor[2])
        pairs = (orders + 1) * (orders + 2) // 2
        tile = dim // 8 * (2 * 3 * pairs + 1)  # instructions for 16 queries and 8 keys: three per pair, and low * low
        if tiles := loop.mix["tensor"] // tile:
            return Work("score", 16.0 * 8 * tiles * report.warps, exponentials=1.0, operations=2.0 * 6 * pairs * dim)
    elif (scalar := SCALAR_KERNEL.fullmatch(report.name)) and loop.mix["mufu"]:
        width, lanes = int(scalar[1]), int(scalar[2])
        keys = 8 if width * lanes <= 128 else 4
        return Work("score", 32.0 / lanes * keys * report.warps, exponentials=1.0)
    return Work("byte", 0.0)


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
