"""Softmax's Taylor rule: every implementation against float64, gradients, transforms, compilation."""

from __future__ import annotations

import pytest
import torch
from accuracy import TINY
from stacked import StackedOp, assert_as_exact, every_isa, needs_extension, rows
from torch import Tensor

from asvit_fast.errors import InputError
from asvit_fast.ops.softmax_taylor import softmax_taylor, softmax_taylor_reference

INFINITY = float("inf")


class TestSoftmax(StackedOp):
    name = "softmax_taylor"
    op = staticmethod(softmax_taylor)
    reference = staticmethod(softmax_taylor_reference)

    def function(self, s: Tensor) -> Tensor:
        return torch.softmax(s, -1)


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [6, 49, 200])
def test_common_offsets_cancel(isa, size, dtype):
    """A number that all logits, or all derivatives, of a row share: exact in the dtype, so nothing may be lost."""
    s = rows(2, 5, size, dtype=torch.float64, scale=1.0).mul(2**10).round().div(2**10).to(dtype)
    offset = torch.tensor([2.0**8, 2.0**10, -(2.0**10)], dtype=dtype)
    shifted = s + offset.reshape(3, 1, 1)
    assert torch.equal(shifted - offset.reshape(3, 1, 1), s)
    assert_as_exact(softmax_taylor(shifted), softmax_taylor_reference(s), TestSoftmax().exact(s), 10 * TINY[dtype])
    assert_as_exact(
        softmax_taylor_reference(shifted), softmax_taylor_reference(s), TestSoftmax().exact(s), 10 * TINY[dtype]
    )


@needs_extension
@every_isa
@pytest.mark.parametrize("size", [6, 49])
def test_large_logits(isa, size):
    s = rows(2, 5, size, scale=1e4)
    p = softmax_taylor(s)
    assert p.isfinite().all()
    torch.testing.assert_close(p, softmax_taylor_reference(s), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p[0].sum(-1), torch.ones(5))


@needs_extension
@every_isa
def test_tails(isa):
    """Relative accuracy down to the least normal number; below, p and its derivatives may be 0."""
    s = rows(2, 2, 300, scale=1.0)
    s[0] = torch.linspace(0, -120, 300)
    truth = TestSoftmax().exact(s)
    assert ((softmax_taylor(s).double() - truth).abs() <= 2e-5 * truth.abs() + 1e-6 * truth[0] + 1e-36).all()


@needs_extension
@every_isa
@pytest.mark.parametrize("size", [6, 49])
def test_masked(isa, size):
    """-inf gives zero in all orders, whatever the derivatives there; the rest is as if it were not there."""
    s = rows(2, 4, size)
    masked = torch.arange(size) % 3 == 1
    dirty = s.clone()
    dirty[0, :, masked] = -INFINITY
    dirty[1, :, masked], dirty[2, :, masked] = float("nan"), INFINITY
    for function in (softmax_taylor, softmax_taylor_reference):
        p = function(dirty)
        assert torch.equal(p[:, :, masked], torch.zeros_like(p[:, :, masked]))
        torch.testing.assert_close(p[:, :, ~masked], softmax_taylor_reference(s[:, :, ~masked]))


@needs_extension
@every_isa
def test_special_rows(isa):
    s = rows(2, 4, 20)
    clean = softmax_taylor(s)
    s[0, 0] = -INFINITY
    s[0, 1, 3] = float("nan")
    s[0, 2, 19] = INFINITY
    for function in (softmax_taylor, softmax_taylor_reference):
        p = function(s)
        assert torch.equal(p[0, :3].isnan(), torch.softmax(s[0, :3], -1).isnan())
        assert p[:, :2].isnan().all()
        torch.testing.assert_close(p[:, 3], clean[:, 3])


def test_bad_input():
    with pytest.raises(InputError, match=r"0 to 2 orders, got shape \(4, 3\)"):
        softmax_taylor(torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"C >= 1, got shape \(3,\)"):
        softmax_taylor(torch.zeros(3))


@needs_extension
def test_compiled_op_checks_for_itself():
    with pytest.raises(ValueError, match="0 to 2 orders"):
        torch.ops.asvit_fast_C.softmax_taylor(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="C >= 1"):
        torch.ops.asvit_fast_C.softmax_taylor(torch.zeros(2))
