"""Compiles a Triton kernel for a GPU that need not be there, and reads what the machine code uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel uses."""

    name: str
    capability: int  # 90 for sm_90
    registers: int  # per thread
    spilled_bytes: int  # local memory per thread
    shared_bytes: int  # per block
    cubin_bytes: int


def compile_kernel(
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    **options: Any,
) -> KernelReport:
    """Compile `kernel` to a cubin for `capability` (80, 90, 100, ...) and report its resources; needs no GPU.

    Args:
        signature: type of each argument that is not a constant ("*fp32", "i64", ...).
        constants: value of each `tl.constexpr` argument.
        options: what a launch would be given (num_warps, enable_fp_fusion, ...).
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")]  # as torch allocates
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    cubin = compiled.asm["cubin"]
    usage = _resource_usage(cubin)
    return KernelReport(
        kernel.__name__, capability, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, len(cubin)
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of a cubin with one kernel, from the cuobjdump that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
