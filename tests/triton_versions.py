"""What tests may ask of the Triton that is installed. torch pins Triton: 2.11 has 3.6."""

from __future__ import annotations

import importlib.util

import numpy
import pytest


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
    """No register is spilled: asked of the newest compiler, for which tiles are chosen."""
    assert OLD or report.spilled_bytes == 0, report
