"""GELU's Taylor rule: every implementation against float64 references, gradients, transforms, compilation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import triton_versions
from accuracy import TINY
from stacked import EXTENSION, TRANSFORMS, every_isa, needs_extension, rows
from torch import Tensor

from asvit_fast import _extension, backends
from asvit_fast.errors import InputError
from asvit_fast.ops.gelu_taylor import gelu_taylor, gelu_taylor_reference

APPROXIMATE = ("none", "tanh")
SHAPES = [(1,), (7,), (16,), (33, 5), (2, 3, 257), (4, 1, 1023), (0, 4), (3, 0)]


def exact(x: Tensor, approximate: str) -> Tensor:
    """In float64, derivatives by torch's autograd of torch's own GELU, not by our formulas."""
    x = x.detach().cpu().double()
    z = x[0].clone().requires_grad_()
    value = F.gelu(z, approximate=approximate)
    first = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), z)[0]
    outputs = [
        value,
        *([first * x[1]] if len(x) > 1 else []),
        *([first * x[2] + second * x[1] ** 2] if len(x) > 2 else []),
    ]
    return torch.stack([output.detach() for output in outputs])


def error(y: Tensor, truth: Tensor) -> float:
    return (y.detach().cpu().double() - truth).abs().max().item() if truth.numel() else 0.0


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", list(TINY))
@pytest.mark.parametrize("orders", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(device, shape, orders, dtype, approximate):
    x = rows(orders, *shape, dtype=dtype, device=device)
    y = gelu_taylor(x, approximate)
    truth = exact(x, approximate)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert error(y, truth) <= 2 * error(gelu_taylor_reference(x, approximate), truth) + TINY[dtype]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 40_001])
def test_every_isa(isa, size, dtype, approximate):
    x = rows(2, size, dtype=dtype)
    truth = exact(x, approximate)
    with backends.use_backend("cpu"):
        y = gelu_taylor(x, approximate)
    for order in range(3):  # each row by itself: a large one must not hide another
        allowed = 2 * error(gelu_taylor_reference(x, approximate)[order], truth[order]) + TINY[dtype]
        assert error(y[order], truth[order]) <= allowed


@needs_extension
@every_isa
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_result_does_not_depend_on_position(isa, approximate):
    x = rows(2, 100)
    whole = gelu_taylor(x, approximate)
    assert torch.equal(gelu_taylor(x[:, 3:42], approximate), whole[:, 3:42])


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_special_values(isa, approximate, dtype):
    infinity, nan = float("inf"), float("nan")
    x = torch.tensor([infinity, -infinity, nan, 1e30, -1e30, 50.0, -50.0, 1e-40, -1e-40, 0.0], dtype=dtype)
    value, first, second = gelu_taylor(torch.stack([x, torch.ones_like(x), torch.zeros_like(x)]), approximate)
    assert value[0] == infinity
    assert torch.stack([value[2], first[2], second[2]]).isnan().all()
    torch.testing.assert_close(
        value[3:], torch.tensor([1e30, 0, 50, 0, 5e-41, -5e-41, 0], dtype=dtype), rtol=1e-6, atol=1e-45
    )
    assert first[[0, 1, 3, 4, 5, 6]].tolist() == [1, 0, 1, 0, 1, 0]
    assert second[[0, 1, 3, 4, 5, 6]].tolist() == [0] * 6
    torch.testing.assert_close(first[7:], torch.full_like(first[7:], 0.5))


def test_tail_keeps_relative_accuracy():
    if EXTENSION is None:
        pytest.skip(str(_extension.reason()))
    x = torch.linspace(-8, -2, 1001)
    truth = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    value = gelu_taylor(x.unsqueeze(0))[0].double()
    assert ((value - truth) / truth).abs().max() < 1e-5  # torch's own GELU loses all digits here


def test_non_contiguous(device):
    x = rows(2, 6, 50, device=device)
    for view in (x[:, ::2], x.transpose(1, 2), x[:, :, 1:], x.flip(1)):
        torch.testing.assert_close(gelu_taylor(view), gelu_taylor(view.contiguous()), rtol=1e-6, atol=1e-6)


def test_does_not_write_into_its_input(device):
    x = rows(2, 40, device=device)
    before = x.clone()
    gelu_taylor(x)
    assert torch.equal(x, before)


@needs_extension
def test_threads_agree():
    x = rows(2, 100_003)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gelu_taylor(x))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# --------------------------------------------------------------------------- gradients, transforms, compilation


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("orders", [0, 1, 2])
def test_gradients(device, orders, approximate):
    x = rows(orders, 3, 4, dtype=torch.float64, device=device, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(gelu_taylor, (x, approximate))
    assert torch.autograd.gradgradcheck(gelu_taylor, (x, approximate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_in_each_dtype(device, dtype):
    x = rows(2, 64, dtype=dtype, device=device, scale=1.0).requires_grad_()
    weights = rows(2, 64, dtype=dtype, device=device)
    (ours,) = torch.autograd.grad(gelu_taylor(x), x, weights)
    z = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(gelu_taylor_reference(z), z, weights.double())
    (theirs,) = torch.autograd.grad(gelu_taylor_reference(x), x, weights)
    assert ours.dtype == dtype
    assert error(ours, truth.cpu()) <= 2 * error(theirs, truth.cpu()) + TINY[dtype]


@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("orders", [0, 1, 2])
def test_opcheck(device, orders, approximate):
    for requires_grad in (False, True):
        x = rows(orders, 5, 3, device=device).requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.asvit_fast.gelu_taylor.default, (x, approximate))


@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_compile(device, approximate):
    def loss(x: Tensor) -> Tensor:
        return (gelu_taylor(x.sin(), approximate) ** 2).sum()

    x = rows(2, 9, 5, device=device).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms(name, compiled):
    x = rows(2, 4, dtype=torch.float64, scale=1.0)

    def run(function) -> Tensor:
        return TRANSFORMS[name](function, x)

    ours = torch.compile(run, backend="aot_eager") if compiled else run
    torch.testing.assert_close(ours(gelu_taylor), run(gelu_taylor_reference))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gelu_taylor(x)

    x = rows(1, 8)
    torch.testing.assert_close(torch.export.export(Module(), (x,)).module()(x), gelu_taylor(x))


# --------------------------------------------------------------------------- Triton, backends, bad input


INTERPRETED = """
import torch
from asvit_fast.backends import use_backend
from asvit_fast.ops.gelu_taylor import gelu_taylor, gelu_taylor_reference
torch.manual_seed(0)
for dtype, tiny in ((torch.float32, 1e-6), (torch.float64, 1e-14), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
    for approximate in ("none", "tanh"):
        for shape in ((1, 0), (1, 5), (2, 3, 7), (3, 1500)):
            x = (2 * torch.randn(shape)).to(dtype)
            with use_backend("triton"):
                y = gelu_taylor(x, approximate)
            assert y.shape == x.shape and y.dtype == dtype
            if x.numel():
                bias = torch.linspace(-1, 1, shape[-1]).to(dtype)
                with use_backend("triton"):
                    biased = gelu_taylor(x, approximate, bias)
                assert torch.allclose(biased, gelu_taylor_reference(x, approximate, bias), rtol=1e-2, atol=100 * tiny)
            truth = gelu_taylor_reference(x.double(), approximate)
            theirs = (gelu_taylor_reference(x, approximate) - truth).abs()
            ours = (y - truth).abs()
            assert ours.numel() == 0 or ours.max() <= 2 * theirs.max() + tiny, (dtype, approximate, shape, ours.max())
x = torch.tensor([[float("inf"), 1e30, -1e30, float("nan")], [1.0, 1.0, 1.0, 1.0]])
with use_backend("triton"):
    y = gelu_taylor(x)
assert y[1, :3].tolist() == [1, 1, 0] and y[:, 3].isnan().all(), y
print("checked")
"""


@triton_versions.interpreter
def test_triton_interpreter(root):
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "checked", result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", list(TINY))
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("size", [1, 1023, 4096])
def test_gpu_backends(backend, dtype, approximate, size):
    why = backends.available("gelu_taylor", backend, "cuda")
    if why is not None:
        pytest.skip(why)
    x = rows(2, size, dtype=dtype, device="cuda")
    with backends.use_backend(backend):
        y = gelu_taylor(x, approximate)
    truth = exact(x, approximate)
    assert error(y, truth) <= 2 * error(gelu_taylor_reference(x, approximate), truth) + TINY[dtype]


@pytest.mark.parametrize("orders", [0, 2])
def test_reference_backend_is_used_when_forced(orders):
    x = rows(orders, 33)
    with backends.use_backend("reference"):
        assert torch.equal(gelu_taylor(x), gelu_taylor_reference(x))


# --------------------------------------------------------------------------- bias


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("approximate", APPROXIMATE)
@pytest.mark.parametrize("dtype", list(TINY))
@pytest.mark.parametrize("orders", [0, 1, 2])
def test_bias(device, orders, dtype, approximate):
    for shape in [(1, 1), (5, 7), (3, 16), (2, 3, 33), (400, 96), (0, 4)]:
        x = rows(orders, *shape, dtype=dtype, device=device)
        bias = rows(0, shape[-1], dtype=dtype, device=device, scale=1.0)[0]
        truth = exact(torch.cat([(x[0].double() + bias.double()).unsqueeze(0), x[1:].double()]), approximate)
        allowed = 2 * error(gelu_taylor_reference(x, approximate, bias), truth) + TINY[dtype]
        assert error(gelu_taylor(x, approximate, bias), truth) <= allowed


@needs_extension
@every_isa
@pytest.mark.parametrize("channels", [1, 3, 16, 100])
def test_bias_on_every_isa(isa, channels):
    x, bias = rows(2, 700, channels), rows(0, channels)[0]
    shifted = torch.cat([(x[0] + bias).unsqueeze(0), x[1:]])
    assert torch.equal(gelu_taylor(x, bias=bias), gelu_taylor(shifted))


@pytest.mark.parametrize("orders", [0, 1, 2])
def test_bias_gradients(device, orders):
    x = rows(orders, 2, 3, dtype=torch.float64, device=device, scale=1.0).requires_grad_()
    bias = rows(0, 3, dtype=torch.float64, device=device, scale=1.0)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: gelu_taylor(x, "none", bias), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: gelu_taylor(x, "none", bias), (x, bias))
    torch.library.opcheck(torch.ops.asvit_fast.gelu_taylor.default, (x, "none", bias))


def test_bias_under_transforms():
    x, bias = rows(2, 5, 4, dtype=torch.float64), rows(0, 4, dtype=torch.float64)[0]
    for name, transform in TRANSFORMS.items():
        ours = transform(lambda z: gelu_taylor(z, bias=bias), x[:, :1] if name == "hessian" else x)
        theirs = transform(lambda z: gelu_taylor_reference(z, bias=bias), x[:, :1] if name == "hessian" else x)
        torch.testing.assert_close(ours, theirs)


def test_bad_input():
    with pytest.raises(InputError, match=r"0 to 2 orders, got shape \(4, 3\)"):
        gelu_taylor(torch.zeros(4, 3))
    with pytest.raises(InputError, match="0 to 2 orders"):
        gelu_taylor(torch.tensor(1.0))
    with pytest.raises(InputError, match=r"floating point, got torch\.int64"):
        gelu_taylor(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="'none' or 'tanh', got 'erf'"):
        gelu_taylor(torch.zeros(2, 3), "erf")
    with pytest.raises(InputError, match=r"bias must be \[C\] .* got shape \(4,\) for x \(2, 3\)"):
        gelu_taylor(torch.zeros(2, 3), bias=torch.zeros(4))


@needs_extension
def test_compiled_op_checks_for_itself():
    with pytest.raises(ValueError, match="0 to 2 orders"):
        torch.ops.asvit_fast_C.gelu_taylor(torch.zeros(4, 3), "none")
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        torch.ops.asvit_fast_C.gelu_taylor(torch.zeros(2, 3), "erf")
