"""torch.compile of networks on a GPU, forward and backward: one graph. Without a GPU: a library stands in for CUDA's
runtime and tensors are fake, so that everything but kernels happens as on a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def fake_runtime(tmp_path_factory) -> Path:
    """tests/fake_cuda_runtime.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("runtime") / "libcuda.so.1"
    options = ("-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    subprocess.run([compiler, *options, "-o", library, FOLDER / "fake_cuda_runtime.c"], check=True)
    return library


def traced(library: Path, program: str, *arguments: str) -> dict:
    """The output of a program of this folder when it thinks that there is a GPU."""
    environment = os.environ | {"LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(library.parent)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(FOLDER / program), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", ["as-vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("as-vit reduced", "swin"))]
)
def test_one_graph(fake_runtime, name):
    dtypes = ["bfloat16", "float16"]
    assert traced(fake_runtime, "cuda_tracing_program.py", ",".join(dtypes), name) == {name: dtypes}


OTHERS = ("swinv2", "swinv2_cr", "maxvit rw", "maxvit parallel", "tiny_vit padded", "davit", "twins", "nest", "pvt_v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, "torchvision", "torchvision v2"])
def test_one_graph_of_other_families(fake_runtime, name):
    assert traced(fake_runtime, "cuda_tracing_program.py", "bfloat16", name) == {name: ["bfloat16"]}


def test_launches(fake_runtime, root):
    """Every kernel is started without an error; nothing falls back."""
    text = "\n".join(path.read_text() for path in (root / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(\n    \w+_pointer", text, re.MULTILINE))
    assert set(traced(fake_runtime, "cuda_launches_program.py")) == kernels


@pytest.mark.slow
def test_launcher(fake_runtime):
    """After its first launch a kernel is started without Triton's binding, with the same arguments, unless Triton would
    have another kernel or sees the launch itself."""
    found = traced(fake_runtime, "launcher_program.py")
    by_triton = {"first", "other dtype", "unaligned", "debug", "other batch"}
    assert {name for name, launch in found.items() if launch["by Triton"]} == by_triton
    assert all(launch["launches"] == 1 and launch["arguments fit"] for launch in found.values())
    assert {launch["name"] for launch in found.values()} == {"window_attention_single_tile_kernel"}
    assert {name for name, launch in found.items() if launch["hooked"]} == {"launch hook"}
    assert found["second"]["grid"] == 2 * found["other batch again"]["grid"]
