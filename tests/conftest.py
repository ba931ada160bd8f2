"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from asvit_fast import _extension


def pytest_configure(config: pytest.Config) -> None:
    """Without the extension, falling back to the references is expected; test_build.py asks why it is missing."""
    if _extension.extension() is None:
        config.addinivalue_line("filterwarnings", "ignore::asvit_fast.backends.FallbackWarning")


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
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    return torch.device(request.param)


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
