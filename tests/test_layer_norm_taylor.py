"""LayerNorm's Taylor rule: every implementation against float64, gradients, transforms, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import TINY
from stacked import StackedOp, assert_as_exact, every_isa, needs_extension, rows
from torch import Tensor

from asvit_fast.errors import InputError
from asvit_fast.ops.layer_norm_taylor import layer_norm_taylor, layer_norm_taylor_reference

EPS = 1e-5


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """In plain PyTorch operations: nested forward mode through torch's own is wrong."""
    c = x - x.mean(-1, keepdim=True)
    y = c / (c.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


class TestLayerNorm(StackedOp):
    name = "layer_norm_taylor"
    op = staticmethod(layer_norm_taylor)
    reference = staticmethod(layer_norm_taylor_reference)

    def function(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return layer_norm(x, *parameters)

    def parameters(self, channels: int, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, ...]:
        weight, bias = rows(1, channels, dtype=dtype, device=device, scale=1.0).unbind(0)
        return weight.clone(), bias.clone()

    def arguments(self, parameters: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return *parameters, EPS


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [5, 40])
def test_affine_is_optional(device, size, biased, weighted):
    x = rows(2, 6, size, device=device)
    weight, bias = TestLayerNorm().parameters(size, torch.float32, device)
    chosen = weight if weighted else None, bias if biased else None
    torch.testing.assert_close(layer_norm_taylor(x, *chosen), layer_norm_taylor_reference(x, *chosen))


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 32, 1000])
def test_mean_far_above_the_deviation(isa, size, dtype):
    """E[x^2] - mean^2 would cancel; so would derivatives with a large common part."""
    x = rows(2, 4, size, dtype=dtype, scale=1.0) + 1000.0
    truth = TestLayerNorm().exact(x)
    theirs = layer_norm_taylor_reference(x)
    assert_as_exact(layer_norm_taylor(x), theirs, truth, 1e3 * TINY[dtype])


@needs_extension
@every_isa
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_any_scale(isa, scale):
    """No power of the deviation over- or underflows on the way."""
    x = rows(2, 4, 48, scale=1.0)
    y, expected = layer_norm_taylor(x * scale, eps=0.0), layer_norm_taylor(x, eps=0.0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@needs_extension
@every_isa
def test_special_values(isa):
    x = rows(2, 4, 20)
    clean = layer_norm_taylor(x)
    x[1, 0, 3], x[0, 2, 5] = float("nan"), float("inf")
    y = layer_norm_taylor(x)
    assert torch.equal(y[0, 0], clean[0, 0]) and y[1:, 0].isnan().all()
    assert y[:, 2].isnan().any(-1).all()
    assert torch.equal(y[:, [1, 3]], clean[:, [1, 3]])
    constant = layer_norm_taylor(torch.full((2, 1, 20), 3.0))
    assert torch.equal(constant, torch.zeros(2, 1, 20))


def test_bad_input():
    with pytest.raises(InputError, match=r"0 to 2 orders, got shape \(4, 3\)"):
        layer_norm_taylor(torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"C >= 1, got shape \(3,\)"):
        layer_norm_taylor(torch.zeros(3))
    with pytest.raises(InputError, match=r"C >= 1, got shape \(3, 5, 0\)"):
        layer_norm_taylor(torch.zeros(3, 5, 0))
    with pytest.raises(InputError, match=r"weight must be \[C\] .* got shape \(4,\) for x \(3, 2, 5\)"):
        layer_norm_taylor(torch.zeros(3, 2, 5), torch.ones(4))


@needs_extension
def test_compiled_op_checks_for_itself():
    op = torch.ops.asvit_fast_C.layer_norm_taylor
    with pytest.raises(ValueError, match="0 to 2 orders"):
        op(torch.zeros(4, 3), None, None, EPS)
    with pytest.raises(ValueError, match="C >= 1"):
        op(torch.zeros(2), None, None, EPS)
    with pytest.raises(ValueError, match=r"bias must be \[C\]"):
        op(torch.zeros(2, 3), None, torch.zeros(2), EPS)
