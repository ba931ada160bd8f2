"""Tanh's Taylor rule: every implementation against float64, gradients, transforms, compilation."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from stacked import StackedOp, every_isa, needs_extension
from torch import Tensor

from asvit_fast.errors import InputError
from asvit_fast.ops.tanh_taylor import tanh_taylor, tanh_taylor_reference


class TestTanh(StackedOp):
    name = "tanh_taylor"
    op = staticmethod(tanh_taylor)
    reference = staticmethod(tanh_taylor_reference)
    shapes: ClassVar = [*StackedOp.shapes, (1,), (17,), (3, 0)]

    def function(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(isa, dtype):
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([infinity, -infinity, nan, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    value, first, second = tanh_taylor(torch.stack([x, torch.ones_like(x), torch.zeros_like(x)]))
    assert value[[0, 1, 3, 4, 5, 6]].tolist() == [1, -1, 1, -1, 0, 0]
    assert torch.stack([value[2], first[2], second[2]]).isnan().all()
    assert first[[0, 1, 3, 4, 5, 6]].tolist() == [0, 0, 0, 0, 1, 1]
    assert second[[0, 1, 3, 4, 5, 6]].tolist() == [0] * 6


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relative_accuracy(isa, dtype):
    """Accuracy of small values, which 1 - e^-2x would spoil, and of the derivative far out, which 1 - y^2 would."""
    small = torch.logspace(-30, 0, 1001, dtype=dtype)
    far = torch.linspace(1, 20, 1001, dtype=dtype)
    allowed = 4 * torch.finfo(dtype).eps
    value = tanh_taylor(small.unsqueeze(0))[0].double()
    assert (value / small.double().tanh() - 1).abs().max() < allowed
    first = tanh_taylor(torch.stack([far, torch.ones_like(far)]))[1].double()
    assert (first * far.double().cosh() ** 2 - 1).abs().max() < (20 if dtype == torch.float32 else 1) * allowed


def test_bad_input():
    with pytest.raises(InputError, match=r"tanh_taylor: x must be .* 0 to 2 orders, got shape \(4, 3\)"):
        tanh_taylor(torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"floating point, got torch\.int64"):
        tanh_taylor(torch.zeros(2, 3, dtype=torch.int64))
