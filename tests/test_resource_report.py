"""benchmarks/resource_report.py: what it reads from the compiler, and that a source is free of spills."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# the words of ptxas -v; the second kernel spills
PTXAS = """\
ptxas info    : Compiling entry function '_ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l' for 'sm_90'
ptxas info    : Function properties for _ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24624 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    24 bytes stack frame, 20 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 24 bytes cumulative stack size
"""


@pytest.fixture(scope="module")
def report(root: Path) -> ModuleType:
    path = root / "benchmarks" / "resource_report.py"
    specification = importlib.util.spec_from_file_location("resource_report", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["resource_report"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_what_the_compiler_says(report):
    template, plain = report.parse(PTXAS, 90)
    assert template.kernel in ("kernel<float, 2>", "_ZN10asvit_fast12_GLOBAL__N_16kernelIfLi2EEEvPT_l")
    assert (template.registers, template.stack_bytes, template.shared_bytes, template.spills) == (40, 16, 24624, False)
    assert plain == report.Usage("plain", 90, 255, 24, 20, 8, 0)
    assert plain.spills
    lines = report.table([template, plain]).splitlines()
    assert [line.endswith("SPILLS") for line in lines] == [False, False, True]


def test_same_architectures_as_the_build(report, root):
    archs = ", ".join(f'"{arch / 10:.1f}"' for arch in report.ARCHS)
    assert f"DEFAULT_ARCHS = ({archs})" in (root / "setup.py").read_text()


def test_layer_norm_does_not_spill(report, root):
    if report.find_nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or PATH")
    command = [sys.executable, str(root / "benchmarks" / "resource_report.py")]
    arguments = ["--archs", "90", "--sources", "layer_norm_taylor"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "24 kernels on 1 architectures, 0 with spills" in result.stdout
    assert "layer_norm_taylor_kernel<" in result.stdout
