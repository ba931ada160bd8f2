"""The bias of every pair of tokens from a table: kernels in Triton's interpreter against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import triton_versions

from asvit_fast.backends import use_backend
from asvit_fast.ops.position_bias import position_bias, position_bias_reference

pytest.importorskip("triton")
# queries, keys, rows of the table, heads
SHAPES = [(49, 49, 169, 3), (12, 48, 77, 2), (1, 1, 1, 1), (30, 30, 500, 2), (25, 25, 2, 5)]


def check_numbers(device: torch.device) -> None:
    """Output and gradient: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny; rows without a pair get 0."""
    for dtype, tiny in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        for queries, keys, rows, heads in SHAPES:
            index = torch.randint(0, rows, (queries, keys), device=device)
            table = torch.randn(rows, heads, device=device).to(dtype).requires_grad_()
            gradient = torch.randn(heads, queries, keys, device=device).to(dtype)
            with use_backend("triton"):
                output = position_bias(table, index, queries, keys)
                assert output.grad_fn.next_functions[0][0].name() == "_PositionBiasBackward"  # below a view
                (ours,) = torch.autograd.grad(output, table, gradient)
            assert torch.equal(output, position_bias_reference(table, index, queries, keys)) and output.is_contiguous()
            assert ours.dtype == dtype and ours.is_contiguous()
            exact = _gradient(table.double(), index, gradient.double())
            error, allowed = (ours - exact).abs().max(), (_gradient(table, index, gradient) - exact).abs().max()
            assert error < 2 * allowed + tiny * max(1.0, exact.abs().max().item())


def _gradient(table: torch.Tensor, index: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    leaf = table.detach().requires_grad_()
    return torch.autograd.grad(position_bias_reference(leaf, index, *index.shape), leaf, gradient)[0]


def check_uses(device: torch.device) -> None:
    """Second derivatives, batches of gradients, an index that changes, that is of its call, that is of no table."""
    index = torch.randint(0, 9, (4, 4), device=device)
    table, gradient = torch.randn(9, 2, device=device, requires_grad=True), torch.randn(2, 4, 4, device=device)
    with use_backend("triton"):
        (first,) = torch.autograd.grad((position_bias(table, index, 4, 4) ** 2).sum(), table, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), table)
        counts = torch.bincount(index.flatten(), minlength=9).unsqueeze(1)  # of pairs
        torch.testing.assert_close(first, 2 * table * counts)
        torch.testing.assert_close(second, (2.0 * counts).expand_as(table))
        output = position_bias(table, index, 4, 4)
        (batch,) = torch.autograd.grad(output, table, torch.stack([gradient, 2 * gradient]), is_grads_batched=True)
        one = _gradient(table, index, gradient)
        torch.testing.assert_close(batch, torch.stack([one, 2 * one]))
        index[0, 0] = (index[0, 0] + 1) % 9
        for _ in range(2):
            for rows in (index, index[:3, :2], index.flatten()):
                shape = rows.shape if rows.dim() == 2 else (4, 4)
                output = position_bias(table, rows, *shape)
                assert torch.equal(output, position_bias_reference(table, rows, *shape))
        negative = position_bias(table, index - 9, 4, 4)
        assert torch.equal(negative, position_bias_reference(table, index, 4, 4))  # counted from the end, as in torch
        if device.type == "cpu":  # on a GPU an assertion of the device
            with pytest.raises(IndexError):
                position_bias(table, index + 9, 4, 4)


def check(name: str, device: torch.device) -> None:
    """One of the checks."""
    torch.manual_seed(0)
    {"numbers": check_numbers, "uses": check_uses}[name](device)


@triton_versions.interpreter
@pytest.mark.parametrize("name", ["numbers", "uses"])
def test_interpreted(name, root):
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["numbers", "uses"])
def test_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    check(name, torch.device("cuda"))
