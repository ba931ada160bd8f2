"""Compiles csrc/cuda/*.cu with nvcc for GPUs that need not be there, and reads what each kernel uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kernel_inspection import Instruction, KernelReport, block_threads, disassemble

ROOT = Path(__file__).resolve().parent.parent
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
Compiled = tuple[KernelReport, list[Instruction]]


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
