"""Decisions of setup.py, the installed build report, and Triton kernels compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from asvit_fast import _extension


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it runs nothing when imported."""
    pytest.importorskip("setuptools")
    path = Path(__file__).resolve().parent.parent / "setup.py"
    specification = importlib.util.spec_from_file_location("asvit_fast_setup", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["asvit_fast_setup"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("value", "mode"), [(None, "auto"), ("", "auto"), ("cuda", "cuda"), (" CPU ", "cpu"), ("none", "none")]
)
def test_build_mode(build, value, mode):
    assert build.build_mode({} if value is None else {"ASVIT_FAST_BUILD": value}) == mode


def test_unknown_build_mode(build):
    with pytest.raises(SystemExit, match="ASVIT_FAST_BUILD='gpu' is not known: use one of auto, cuda, cpu, none"):
        build.build_mode({"ASVIT_FAST_BUILD": "gpu"})


def test_old_setuptools_are_refused(build, monkeypatch, root):
    """As a fresh environment of Python 3.11 has them: they would say `invalid command 'bdist_wheel'`."""
    import setuptools

    assert f"setuptools>={build.OLDEST_SETUPTOOLS}" in (root / "pyproject.toml").read_text()
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"65\.5\.0 is too old .*pip install --upgrade 'setuptools>=77'"):
        build.main()


def test_mode_none_builds_nothing(build):
    plan = build.make_plan("none")
    assert not plan.extension
    assert plan.report["reason"] == "ASVIT_FAST_BUILD=none"


@pytest.fixture
def toolkit(tmp_path, build, monkeypatch) -> Path:
    """A folder that looks like a CUDA 13.0 toolkit, the only one on the machine."""
    for file in ("include/cuda_runtime_api.h", "lib64/libcudart_static.a", "bin/nvcc"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    answers = {
        "--version": "Cuda compilation tools, release 13.0, V13.0.88",
        "--list-gpu-arch": "compute_75\ncompute_80\ncompute_90",
    }
    monkeypatch.setattr(build, "output_of", lambda *command: answers.get(command[-1], ""))
    monkeypatch.setattr(build, "toolkit_candidates", lambda: [tmp_path])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path


def test_toolkit_is_found(build, toolkit):
    assert build.find_toolkit("13.2") == build.Toolkit(toolkit, "13.0")


@pytest.mark.parametrize("missing", ["include/cuda_runtime_api.h", "lib64/libcudart_static.a", "bin/nvcc"])
def test_incomplete_toolkit(build, toolkit, missing):
    (toolkit / missing).unlink()
    with pytest.raises(build.CannotBuild, match=f"{toolkit} has no .*{Path(missing).stem}"):
        build.find_toolkit("13.2")


def test_toolkit_of_another_major_version(build, toolkit):
    with pytest.raises(build.CannotBuild, match=r"is CUDA 13\.0, torch was built with CUDA 12\.8"):
        build.find_toolkit("12.8")


def test_cpu_only_torch(build, toolkit):
    with pytest.raises(build.CannotBuild, match="torch is a CPU-only build"):
        build.find_toolkit(None)


def test_default_archs_are_what_nvcc_supports(build, toolkit):
    assert build.arch_list(build.Toolkit(toolkit, "13.0")) == "8.0;9.0+PTX"


def test_chosen_archs_are_kept(build, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert build.arch_list(build.Toolkit(toolkit, "13.0")) == "9.0a"


def cannot(build, reason):
    def fail(*_):
        raise build.CannotBuild(reason)

    return fail


@pytest.mark.parametrize("mode", ["cuda", "cpu"])
@pytest.mark.parametrize("part", ["find_torch", "find_compiler"])
def test_demanded_build_fails_loudly(build, monkeypatch, mode, part):
    monkeypatch.setattr(build, part, cannot(build, "there is none"))
    with pytest.raises(SystemExit, match=f"ASVIT_FAST_BUILD={mode}: there is none"):
        build.make_plan(mode)
    plan = build.make_plan("auto")
    assert not plan.extension
    assert plan.report["reason"] == "there is none"


def test_cuda_is_decided_by_the_toolkit(build, monkeypatch, toolkit):
    torch = SimpleNamespace(__version__="2.15.0", version=SimpleNamespace(cuda="13.2"))  # has no .cuda to ask for a GPU
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    monkeypatch.setattr(build, "find_compiler", lambda: ("c++", "c++ 12"))
    plan = build.make_plan("cuda")
    assert plan.toolkit.root == toolkit
    assert plan.report["archs"] == ["8.0", "9.0+PTX"]
    monkeypatch.setattr(build, "find_toolkit", cannot(build, "no nvcc"))
    with pytest.raises(SystemExit, match="ASVIT_FAST_BUILD=cuda: no nvcc"):
        build.make_plan("cuda")
    plan = build.make_plan("auto")
    assert plan.extension
    assert plan.toolkit is None
    assert plan.report["cuda_reason"] == "no nvcc"


def test_nvcc_behind_a_wrapper_script(build, tmp_path):
    wrapper = tmp_path / "nvcc"
    wrapper.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/cuda-13.0/bin' >&2\n")
    wrapper.chmod(0o755)
    assert build.nvcc_root(str(wrapper)) == Path("/opt/cuda-13.0")


def test_all_kernels_are_compiled_for_every_instruction_set(build, root):
    sources = build.isa_sources()
    for header in (root / "csrc" / "cpu").glob("*_kernel.h"):
        op = header.name.removesuffix("_kernel.h").removesuffix("_backward")
        for isa in ("portable", "avx2", "avx512", "avx512bf16"):
            source = sources[root / "build" / "isa" / f"{op}_{isa}.cpp"]
            assert f"#define ASVIT_FAST_ISA {isa}\n" in source
            kernels = root / "csrc" / f"cpu/{op}_backward_kernel.h"
            assert header.name in source or header.name in kernels.read_text()


# --------------------------------------------------------------------------- what is installed


def test_installed_build_did_not_fail():
    report = _extension.build_report()
    assert report, "install the package first: make"
    assert not report.get("failed"), report["reason"]


def test_reasons_for_no_extension():
    assert "never installed" in _extension.unsupported_reason({}, "2.15.0")
    why = _extension.unsupported_reason({"extension": False, "reason": "no C++ compiler"}, "2.15.0")
    assert "no C++ compiler; build them with `pip install --no-build-isolation" in why
    built = {"extension": True, "torch": "2.14.0", "oldest torch": "2.11"}
    assert "need torch 2.11 or later, this is torch 2.9.1" in _extension.unsupported_reason(built, "2.9.1+cpu")
    for running in ("2.11.0", "2.14.0+cu130", "2.100.0a0+git1234", "3.0.0"):
        assert _extension.unsupported_reason(built, running) is None


def test_loader_keeps_the_error(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: _ZN3c10")

    _extension._load.cache_clear()
    monkeypatch.setattr(_extension, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    try:
        assert _extension.extension() is None
        assert _extension.reason().startswith("asvit_fast._C does not load: undefined symbol: _ZN3c10; rebuild it with")
    finally:
        _extension._load.cache_clear()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_c_functions_of_torch_are_needed():
    """One build for every torch: C++ of torch changes with each, its C functions stay. And one for every Python."""
    if _extension.reason() is not None:
        pytest.skip(_extension.reason())
    path = _extension.extension().__file__
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    torchs = [name for name in names if re.search("torch|c10|2at", name)]
    assert torchs and all(re.match("(aoti_)?torch_", name) for name in torchs), torchs
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert Path(path).name == "_C.abi3.so"


def test_kernels_of_older_sources(monkeypatch):
    """An op without its compiled kernel, as after `git pull` in an editable install: no AttributeError in a model."""
    if _extension.reason() is not None:
        pytest.skip(_extension.reason())
    _extension._load.cache_clear()
    monkeypatch.setattr(_extension, "_waiting", [lambda: torch.ops.asvit_fast_C.not_there])
    try:
        assert re.search("older than the package .*not_there.*: rebuild them with", _extension.reason())
    finally:
        _extension._load.cache_clear()


def install(root: Path, target: Path, **environment: str) -> dict:
    """Really install the checkout, without torch's build isolation, into `target`; returns its build report."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        str(root),
    ]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    return json.loads((target / "asvit_fast" / "_build.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "cpu"])
def test_install(root, tmp_path, mode):
    report = install(root, tmp_path, ASVIT_FAST_BUILD=mode)
    assert report["extension"] == (mode == "cpu")
    assert bool(list((tmp_path / "asvit_fast").glob("_C.*"))) == (mode == "cpu")
    assert (tmp_path / "asvit_fast" / "kernels" / "gelu_taylor.py").exists()
    assert not (tmp_path / "kernels").exists()
    program = (
        "from asvit_fast.ops.gelu_taylor import gelu_taylor; import torch; print(gelu_taylor(torch.zeros(2, 3)).shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)


@pytest.mark.slow
def test_install_survives_a_compiler_that_fails(root, tmp_path):
    report = install(root, tmp_path, ASVIT_FAST_BUILD="auto", CXX="false", CUDA_HOME="/nowhere")
    assert not report["extension"]
    assert report["reason"].startswith("compilation failed")


@pytest.mark.skipif("address" not in os.environ.get("ASVIT_FAST_SANITIZE", ""), reason="for make sanitize")
def test_sanitizer_sees_an_overrun():
    """An overrun of one value, in the memory of a tensor: what `make sanitize` would say if a kernel went too far."""
    program = (
        "import numpy, torch; from asvit_fast import _extension; _extension.extension()\n"
        "beyond = numpy.lib.stride_tricks.as_strided(numpy.zeros(1000, numpy.float32), (1, 1001))\n"
        "torch.ops.asvit_fast_C.tanh_taylor(torch.from_numpy(beyond))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


def test_archs_of_the_installed_build(build):
    """Whatever was compiled here was compiled for every GPU that the package supports."""
    report = _extension.build_report()
    if not report.get("cuda"):
        pytest.skip(f"no CUDA kernels: {report.get('cuda_reason', report.get('reason'))}")
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST chooses")
    assert [arch.removesuffix("+PTX") for arch in report["archs"]] == list(build.DEFAULT_ARCHS)
    assert report["archs"][-1].endswith("+PTX")


# --------------------------------------------------------------------------- Triton kernels


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_triton_kernel_compiles(capability, dtype):
    pytest.importorskip("triton")
    from kernel_inspection import compile_kernel

    from asvit_fast.kernels.gelu_taylor import BLOCK, OPTIONS, gelu_taylor_kernel

    pointers = {f"{name}_pointer": f"*{dtype}" for name in ("input", "output", "bias")}
    for tanh, biased in itertools.product((False, True), repeat=2):
        report = compile_kernel(
            gelu_taylor_kernel,
            pointers | {"count": "i64", "channels": "i64"},
            {"ORDERS": 2, "TANH": tanh, "HAS_BIAS": biased, "BLOCK": BLOCK},
            capability,
            **OPTIONS,
        )
        assert report.cubin_bytes > 1000
        assert 16 <= report.registers <= 128
        assert report.spilled_bytes == 0


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="reads g++'s code for x86-64")
def test_products_broadcast_by_loading(root: Path, tmp_path: Path) -> None:
    """0 + x is no number's copy to a compiler, as -0 becomes 0: its addition once stood in every step of a product."""
    source = tmp_path / "product.cpp"
    source.write_text(
        "#define ASVIT_FAST_VECTOR_BYTES 32\n"
        '#include "cpu/small_matmul.h"\n'
        "namespace asvit_fast {\n"
        "void run(const float* a, const float* b, float* c, int64_t depth) {\n"
        "  multiply_block<2, 6>(Product<float>{a, depth, 1, b, 16, nullptr, 0, c, 16}, 0, 0, depth);\n"
        "}\n"
        "}\n"
    )
    command = ["g++", "-O3", "-mavx2", "-mfma", "-mf16c", "-S", "-o", "-", f"-I{root / 'csrc'}", str(source)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert code.count("vfmadd") >= 12 and code.count("vbroadcastss\t") >= 6
    assert "vaddss" not in code and not re.search(r"vbroadcastss\t%xmm", code)
