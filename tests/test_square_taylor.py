"""The square's Taylor rule: every implementation against float64, gradients, transforms, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
import triton_versions
from stacked import StackedOp, along_curve, assert_as_exact, rows
from torch import Tensor

import asvit_fast as af
from asvit_fast.ops.square_taylor import square_taylor, square_taylor_reference


class TestSquare(StackedOp):
    name = "square_taylor"
    op = staticmethod(square_taylor)
    reference = staticmethod(square_taylor_reference)
    shapes: ClassVar = [*StackedOp.shapes, (1,), (17,), (3, 0)]

    def function(self, x: Tensor) -> Tensor:
        return x * x


def check(dtype: str, device: torch.device) -> None:
    from asvit_fast.kernels import square_taylor as kernel

    for orders in (0, 1, 2):
        for shape in ((1, 1), (3, 1031), (0, 4)):
            x = rows(orders, *shape, dtype=getattr(torch, dtype), device=device)
            truth = along_curve(torch.square, x)
            tiny = 4 * torch.finfo(x.dtype).eps
            assert_as_exact(kernel.square_taylor(x), square_taylor_reference(x), truth, tiny)


@triton_versions.interpreter
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_triton_interpreter(dtype: str, root: Path) -> None:
    pytest.importorskip("triton")
    triton_versions.run_interpreted("test_square_taylor", dtype, root)


def test_propagation_uses_it() -> None:
    x = rows(2, 3, 5, dtype=torch.float64)
    squares = (torch.square, lambda value: value.square(), lambda value: value**2, lambda value: torch.pow(value, 2.0))
    for function in squares:
        y, first, second = af.jet(function, x[0], x[1], x[2])
        torch.testing.assert_close(torch.stack([y, first, second]), square_taylor_reference(x))
    z = torch.complex(x, x.flip(0))
    _, first = af.jvp(torch.square, z[0], z[1])
    torch.testing.assert_close(first, 2 * z[0] * z[1])
