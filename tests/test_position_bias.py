"""position_bias: the gather from a table and the table's gradient, of every implementation."""

from __future__ import annotations

import pytest
import torch
import triton_versions

import asvit_fast as af
from asvit_fast import ops
from asvit_fast.errors import InputError
from asvit_fast.ops.position_bias import position_bias_reference

WINDOWS = [(1, 1), (2, 3), (7, 7), (5, 9)]


def relative_index(height: int, width: int) -> torch.Tensor:
    """[tokens, tokens], as Swin numbers offsets."""
    rows, columns = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    down, across = rows[:, None] - rows + height - 1, columns[:, None] - columns + width - 1
    return down * (2 * width - 1) + across


def check(name: str, device: torch.device) -> None:
    """In Triton's interpreter or on a GPU, against float64; "double": a gradient of the gradient."""
    torch.manual_seed(0)
    with af.use_backend("triton"):
        if name == "double":
            return check_double(device)
        dtype = getattr(torch, name)
        for number, (height, width) in enumerate(WINDOWS):
            heads, index = number + 1, relative_index(height, width).to(device)
            entries = int(index.max()) + 1
            table = torch.randn(heads, entries + 3, device=device).to(dtype).t().requires_grad_()  # not contiguous
            given = index.int() if number % 2 else index - (entries + 3)  # from the end
            bias = ops.position_bias(table, given)
            exact = table.detach().double().requires_grad_()
            wanted = position_bias_reference(exact, given.long())
            assert bias.is_contiguous() and bias.dtype == dtype
            assert torch.equal(bias.double(), wanted)
            gradient = torch.randn(bias.shape, device=device).to(dtype).transpose(1, 2)  # not contiguous either
            (found,) = torch.autograd.grad(bias, table, gradient)
            (true,) = torch.autograd.grad(wanted, exact, gradient.double())
            torch.testing.assert_close(found.double(), true, rtol=torch.finfo(dtype).eps, atol=1e-5)
        wrong = torch.tensor([[0, 9]], device=device)
        assert ops.position_bias(torch.ones(9, 1, device=device), wrong).isnan().flatten().tolist() == [False, True]
        assert ops.position_bias(table, given[:0]).shape == (heads, 0, given.shape[1])
        assert ops.position_bias(table[:, :0], given).shape == (0, *given.shape)
    return None


def check_double(device: torch.device) -> None:
    """Both functions are linear, and each other's derivative."""
    index = relative_index(3, 2).to(device)
    table = torch.randn(15, 2, device=device, requires_grad=True)
    weight = torch.randn(2, 6, 6, device=device)

    def of(function):
        (first,) = torch.autograd.grad(function(table, index).pow(3).mul(weight).sum(), table, create_graph=True)
        return first, torch.autograd.grad(first.pow(2).sum(), table)[0]

    for found, wanted in zip(of(ops.position_bias), of(position_bias_reference), strict=True):
        torch.testing.assert_close(found, wanted)


NAMES = ("float32", "bfloat16", "float16", "double")


@triton_versions.interpreter
@pytest.mark.parametrize(
    "name", ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "float32")]
)
def test_interpreted(name, root):
    pytest.importorskip("triton")
    triton_versions.run_interpreted(__name__, name, root)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name, poison_empty):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    check(name, torch.device("cuda"))


def test_negative_numbers_count_from_the_end():
    table, index = torch.randn(5, 2), torch.tensor([[0, -1], [-5, 4]])
    expected = table[index].permute(2, 0, 1)
    assert torch.equal(ops.position_bias(table, index), expected)
    with torch.no_grad():
        assert torch.equal(ops.position_bias(table, index), expected)
        with pytest.raises(IndexError):
            ops.position_bias(table, index + 3)


def test_everywhere_else():
    index = relative_index(2, 3)
    table = torch.randn(15, 2, dtype=torch.double, requires_grad=True)
    bias = ops.position_bias(table, index)
    assert torch.equal(bias, table[index].permute(2, 0, 1))
    assert torch.autograd.gradcheck(lambda x: ops.position_bias(x, index), table)
    assert torch.equal(torch.compile(ops.position_bias, fullgraph=True, backend="eager")(table, index), bias)
    assert torch.equal(torch.func.vmap(ops.position_bias, (0, None))(table[None], index)[0], bias)
    for backend in ("cpu", "reference", "sdpa"):
        with af.use_backend(backend):
            assert torch.equal(ops.position_bias(table, index), bias)


@pytest.mark.parametrize(
    ("table", "index", "message"),
    [
        (torch.ones(3), torch.zeros(2, 2, dtype=torch.long), r"got \[3\] and \[2, 2\]"),
        (torch.ones(3, 1), torch.zeros(2, dtype=torch.long), r"got \[3, 1\] and \[2\]"),
        (torch.ones(3, 1), torch.zeros(2, 2), "index must be int64 or int32, got torch.float32"),
        (torch.ones(3, 1).long(), torch.zeros(2, 2, dtype=torch.long), "table must be floating point, got torch.int64"),
        (torch.ones(3, 1), torch.zeros(2, 2, dtype=torch.long, device="meta"), "index must be on cpu, got one on meta"),
    ],
)
def test_wrong_arguments(table, index, message):
    with pytest.raises(InputError, match=f"position_bias: .*{message}"):
        ops.position_bias(table, index)
