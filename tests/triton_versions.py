"""Helpers of tests of Triton kernels: the installed version (torch 2.11 pins 3.6), and its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _triton() -> tuple[int, int]:
    if importlib.util.find_spec("triton") is None:
        return 0, 0
    import triton

    return _version(triton.__version__)


OLD = _triton() < (3, 8)

interpreter = pytest.mark.skipif(
    OLD and _version(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton before 3.8 fails with numpy 2.4 and later",
)


def assert_no_spills(report) -> None:
    """No register is spilled: asked of the newest compiler, for which tiles are chosen. No value is lost: of all."""
    assert report.stack_pointer_uses == 0, report
    assert OLD or report.spilled_bytes == 0, report


def round_to_bfloat16() -> None:
    """Let the interpreter round float32 to bfloat16 as GPUs do; it cuts the digits off."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: numpy.ndarray, source: language.dtype, target: language.dtype, mode: object) -> numpy.ndarray:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(numpy.array(data, numpy.float32))
        return values.bfloat16().view(torch.int16).numpy().view(numpy.uint16)

    interpreter._convert_float = rounded


def run_interpreted(module: str, name: str, root: Path) -> None:
    """Run `check(name, CPU)` of a test module in Triton's interpreter, which needs a process of its own."""
    program = "import sys, torch; sys.path.insert(0, 'tests'); import triton_versions; "
    program += f"triton_versions.round_to_bfloat16(); from {module} import check; "
    program += f"check({name!r}, torch.device('cpu')); print('checked')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "checked", result.stderr
