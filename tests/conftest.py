"""Fixtures shared by all tests, and what becomes of tests of the GPU where there is none."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from asvit_fast import _extension


def pytest_configure(config: pytest.Config) -> None:
    """Without the extension, falling back to the references is expected; test_build.py asks why it is missing."""
    if _extension.extension() is None:
        config.addinivalue_line("filterwarnings", "ignore::asvit_fast.backends.FallbackWarning")


# --------------------------------------------------------------------------- tests of the GPU

REHEARSED = os.environ.get("ASVIT_FAST_REHEARSE", "0") == "1"  # tests that take the fixture ``gpu`` run on the CPU
GPU_IS_LOST = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction")
MAY_SKIP = ("not enough memory", "one GPU only")  # what a machine with a GPU may lack, as such a reason begins


def pytest_runtest_setup(item: pytest.Item) -> None:
    rehearsed = REHEARSED and "gpu" in getattr(item, "fixturenames", ())
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not rehearsed:
        pytest.skip("torch sees no CUDA GPU")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """ASVIT_FAST_REQUIRE_GPU=1: a test of the GPU that would skip fails.

    After a stray access the GPU answers nothing more in this process: a worker of xdist ends, which names the test, and
    another one goes on with the others.
    """
    report = yield
    if item.get_closest_marker("gpu"):
        _fail_if_skipped(report)
        if report.failed and any(word in report.longreprtext for word in GPU_IS_LOST):
            if hasattr(item.config, "workerinput"):  # not by environment, which programs that a worker starts inherit
                os._exit(1)
            pytest.exit(f"{item.nodeid}: {call.excinfo and call.excinfo.value}", returncode=1)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """So does a module that has some."""
    report = yield
    if report.skipped and isinstance(collector, pytest.Module) and "pytest.mark.gpu" in collector.path.read_text():
        _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Unless the reason is one that may be, or the test is expected to fail."""
    if not report.skipped or hasattr(report, "wasxfail") or os.environ.get("ASVIT_FAST_REQUIRE_GPU", "0") != "1":
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(MAY_SKIP):
        report.outcome = "failed"
        report.longrepr = f"ASVIT_FAST_REQUIRE_GPU=1, and this test of the GPU would be skipped: {reason}"


# --------------------------------------------------------------------------- fixtures


def _settings_of_torch() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.enabled,
    }


@pytest.fixture(autouse=True)
def settings_are_left_as_they_were() -> Iterator[None]:
    """A test that leaves torch with other settings changes the numbers of those after it."""
    before = _settings_of_torch()
    yield
    assert _settings_of_torch() == before


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU if there is one."""
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU of a test that is marked so; the CPU in a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def repeatable_float32() -> Iterator[None]:
    """cuDNN's convolutions of float32 multiply in float32, and sum in the same order each time."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the CPU kernels with the instruction set that the test is parametrised with."""
    extension = _extension.extension()
    assert extension is not None
    before = extension.get_isa()
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa(before)


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """Every uninitialised tensor, allocated in Python or in C++, is full of NaN: an output not fully written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


# --------------------------------------------------------------------------- products


@pytest.fixture
def products_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products take the op ``linear`` as well."""
    linear = importlib.import_module("asvit_fast.ops.linear")
    for limit in ("SMALL", "SMALL_FOR_OURS", "ROWS_IN_TRAINING"):
        monkeypatch.setattr(linear, limit, 0)


@pytest.fixture(params=["own", "onednn"])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries for products, on any processor."""
    for name in ("packed_linear", "linear"):
        module = importlib.import_module(f"asvit_fast.ops.{name}")
        monkeypatch.setattr(module, "library", lambda dtype: request.param if dtype == torch.float32 else None)
    return request.param
