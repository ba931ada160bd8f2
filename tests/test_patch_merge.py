"""patch_merge against a loop written from its definition, and against torch's unfold, LayerNorm and Linear, forward and
backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import TINY, assert_accurate
from stacked import TRANSFORMS, every_isa, needs_extension
from torch import Tensor
from torch_versions import DYNAMIC_DOUBLE_BACKWARD

import asvit_fast as af
from asvit_fast import ops
from asvit_fast.backends import use_backend
from asvit_fast.nn import PatchMerging

Given = list[Tensor | None]  # x, weight, norm_weight, norm_bias, bias


def operands(
    height: int,
    width: int,
    channels: int,
    outputs: int,
    kernel: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
) -> list[Tensor]:
    """A random tensor for every one."""
    features = channels * kernel * kernel
    x = torch.randn(batch, height, width, channels)
    weight = torch.randn(outputs, features) / math.sqrt(features)
    return [t.to(dtype) for t in (x, weight, *(torch.randn(size) for size in (features, features, outputs)))]


def both_ways(given: Given, kernel: int, stride: int, order: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output, and gradients of everything given, for a gradient that only shapes decide."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
    out = ops.patch_merge(*leaves[:2], kernel, stride, *leaves[2:], order=order)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(given[1].dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], gradient.to(out.dtype))]


def assert_as_exact(given: Given, kernel: int, stride: int = 2, order: str = "unfold") -> None:
    """Forward and all gradients: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64."""
    ours = both_ways(given, kernel, stride, order)
    with use_backend("reference"):
        theirs = both_ways(given, kernel, stride, order)
        exact = both_ways(given, kernel, stride, order, torch.float64)
    types = [given[1].dtype, *(t.dtype for t in given if t is not None)]
    for got, other, want, dtype in zip(ours, theirs, exact, types, strict=True):
        assert got.dtype == dtype
        assert_accurate(f"{tuple(want.shape)}", got, other, want)


def features_of(patch: Tensor, order: str) -> Tensor:
    """[B, C, K, K] -> [B, C*K*K]."""
    return patch.flatten(1) if order == "unfold" else patch.permute(0, 3, 2, 1).flatten(1)


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("size", [(4, 6), (7, 5), (1, 1)])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("order", ["unfold", "timm"])
def test_definition(kernel: int, size: tuple[int, int], norm: bool, order: str) -> None:
    torch.manual_seed(0)
    x, weight, *vectors, bias = operands(*size, 3, 5, kernel, torch.float64)
    gain, offset = vectors if norm else (None, None)
    out = ops.patch_merge(x, weight, kernel, 2, gain, offset, bias, order=order)
    rows, columns = math.ceil(size[0] / 2), math.ceil(size[1] / 2)
    assert out.shape == (2, rows, columns, 5)
    before = (kernel - 2) // 2
    for row in range(rows):
        for column in range(columns):
            patch = torch.zeros(2, 3, kernel, kernel, dtype=torch.float64)
            for ky in range(kernel):
                for kx in range(kernel):
                    i, j = 2 * row - before + ky, 2 * column - before + kx
                    if 0 <= i < size[0] and 0 <= j < size[1]:
                        patch[:, :, ky, kx] = x[:, i, j]
            value = features_of(patch, order)
            value = F.layer_norm(value, (value.shape[1],), gain, offset) if norm else value
            torch.testing.assert_close(out[:, row, column], value @ weight.T + bias, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_order_is_that_of(library: str, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, *size, 12)
    if library == "timm":
        theirs = pytest.importorskip("timm.models.swin_transformer").PatchMerging(12)
    else:
        theirs = pytest.importorskip("torchvision.models.swin_transformer").PatchMerging(12)
    torch.nn.init.normal_(theirs.norm.weight)
    torch.nn.init.normal_(theirs.norm.bias)
    ours = ops.patch_merge(
        x, theirs.reduction.weight, 2, 2, theirs.norm.weight, theirs.norm.bias, None, theirs.norm.eps, order="timm"
    )
    torch.testing.assert_close(ours, theirs(x), rtol=1e-4, atol=1e-5)


SHAPES = [  # H, W, C, Cout, kernel, stride: whole and cut vectors, every way of interleaving, blocks that overlap
    (9, 12, 32, 17, 4, 2),
    (28, 30, 24, 8, 3, 2),
    (8, 7, 40, 33, 2, 2),
    (6, 5, 3, 4, 4, 2),
    (5, 9, 19, 2, 1, 2),
    (11, 10, 17, 5, 5, 2),
    (7, 8, 2, 3, 6, 1),
    (10, 9, 16, 130, 3, 3),
    (1, 1, 16, 4, 2, 2),
]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", list(TINY))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_isa(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    *sizes, stride = shape
    for order in ("unfold", "timm"):
        torch.manual_seed(2)
        given: Given = list(operands(*sizes, dtype))
        if order == "timm":
            given[3] = given[4] = None
        assert_as_exact(given, sizes[-1], stride, order)


@needs_extension
@every_isa
@pytest.mark.parametrize("ratio", [1e3, 1e4])
@pytest.mark.parametrize("order", ["unfold", "timm"])
def test_large_mean(isa: str, ratio: float, order: str) -> None:
    """E[x^2] - E[x]^2 would have no correct digit."""
    torch.manual_seed(3)
    given = operands(8, 8, 24, 16, 2)
    given[0] += ratio
    assert_as_exact(given, 2, 2, order)


@needs_extension
@pytest.mark.usefixtures("poison_empty")
def test_constant_neighbourhoods_and_not_a_number() -> None:
    given = operands(8, 8, 16, 4, 2)
    given[0][0] = 3.0
    assert_as_exact(given, 2)
    given[0][1, 2, 3, 4] = torch.nan
    out = ops.patch_merge(*given[:2], 2, 2, *given[2:])
    assert out.isnan().all(-1).nonzero().tolist() == [[1, 1, 1]] and out.isnan().sum() == 4


@needs_extension
def test_large_products() -> None:
    """Several blocks, pieces and groups of outputs, and oneDNN's products."""
    torch.manual_seed(4)
    assert_as_exact(operands(28, 28, 32, 260, 4, batch=3), 4)
    assert_as_exact(operands(20, 21, 16, 360, 4, batch=2), 4)
    assert_as_exact(operands(56, 56, 32, 8, 2, batch=1), 2, 2, "timm")


@needs_extension
@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_agree(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit, also where there is so little that one thread alone would call the library's product."""
    torch.manual_seed(5)
    before = torch.get_num_threads()
    shapes = ((28, 28, 16, 132, 4, 2), (14, 14, 48, 96, 2, 1), (7, 7, 48, 130, 4, 1), (6, 6, 200, 40, 2, 1))
    shapes += ((20, 21, 16, 360, 4, 2),)  # groups of outputs, whose rows are kept
    for height, width, channels, outputs, kernel, batch in shapes:
        given = operands(height, width, channels, outputs, kernel, dtype, batch=batch)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(both_ways(given, kernel, 2, "unfold"))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@needs_extension
def test_layouts() -> None:
    torch.manual_seed(6)
    given = operands(9, 8, 24, 8, 3, torch.float64)
    given[0] = torch.randn(2, 24, 9, 8, dtype=torch.float64).permute(0, 2, 3, 1)  # channels far apart
    given[1] = given[1].T.contiguous().T
    given[2] = given[2].repeat_interleave(2)[::2]
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    out = ops.patch_merge(*leaves[:2], 3, 2, *leaves[2:])
    got = torch.autograd.grad(out.sum(), leaves)  # an expanded gradient
    with use_backend("reference"):
        want = torch.autograd.grad(ops.patch_merge(*leaves[:2], 3, 2, *leaves[2:]).sum(), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    features = 4 * shape[3]
    x = torch.zeros(shape, requires_grad=True)
    if shape[3] == 0 or shape[1] == 0:
        return
    out = ops.patch_merge(x, torch.ones(5, features), 2, 2, torch.ones(features))
    assert out.shape == (shape[0], 2, 2, 5)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


@needs_extension
def test_single_gradients() -> None:
    """Gradients that nobody needs are not computed, which changes nothing."""
    given = operands(7, 8, 8, 6, 3)
    everything = both_ways(given, 3, 2, "unfold")[1:]
    gradient = torch.randn((2, 4, 4, 6), generator=torch.Generator().manual_seed(9))
    for index, want in enumerate(everything):
        leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(given)]
        ops.patch_merge(*leaves[:2], 3, 2, *leaves[2:]).backward(gradient)
        assert torch.equal(leaves[index].grad, want)
        assert all(t.grad is None for i, t in enumerate(leaves) if i != index)


@pytest.mark.parametrize("order", ["unfold", pytest.param("timm", marks=pytest.mark.slow)])
def test_opcheck(order: str) -> None:
    for complete in (True, False):
        x, weight, gain, offset, bias = (t.requires_grad_() for t in operands(5, 4, 3, 4, 3))
        rest = (gain, offset if complete else None, bias if complete else None, 3, 2, 1e-5, order == "timm")
        torch.library.opcheck(torch.ops.asvit_fast.patch_merge.default, (x, weight, *rest))
        out, statistics = torch.ops.asvit_fast.patch_merge(x, weight, *rest)
        wanted = [complete, True, True, complete, complete]
        arguments = (torch.randn_like(out), None, statistics.detach(), x, weight, *rest, wanted)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", *DYNAMIC_DOUBLE_BACKWARD)
        torch.library.opcheck(torch.ops.asvit_fast.patch_merge_gradients.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("count", [5, 3])
def test_gradients_of_every_order(backend: str, count: int) -> None:
    if backend == "cpu" and af.ops.patch_merge is not None and af.show_config is not None:
        pytest.importorskip("asvit_fast._C")
    torch.manual_seed(7)
    given = [t.requires_grad_() for t in operands(3, 2, 2, 2, 2, torch.float64, 1)[:count]]

    def f(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        return ops.patch_merge(x, weight, 2, 2, *vectors, order="timm")

    with use_backend(backend):
        torch.autograd.gradcheck(f, given)
        torch.autograd.gradgradcheck(f, given)
        torch.autograd.gradgradcheck(lambda x: f(x, *(t.detach() for t in given[1:])), given[:1])


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in ("vmap", "vmap(grad)")])
def test_transforms(name: str) -> None:
    torch.manual_seed(8)
    x, weight, *vectors = operands(3, 4, 2, 3, 3, torch.float64, 1)

    def f(x: Tensor) -> Tensor:
        return ops.patch_merge(x, weight, 3, 2, *vectors)

    with use_backend("reference"):
        want = TRANSFORMS[name](f, x)
    torch.testing.assert_close(TRANSFORMS[name](f, x), want)


def test_vmap() -> None:
    x, weight, *vectors = operands(3, 4, 2, 3, 3, torch.float64)

    def f(x: Tensor) -> Tensor:
        return ops.patch_merge(x.unsqueeze(0), weight, 3, 2, *vectors).square().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(torch.stack([f(one) for one in leaf]).sum(), leaf)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(x), want)


@needs_extension
@pytest.mark.parametrize("mode", ["compile", "checkpoint", "export", "script"])
def test_inside(mode: str) -> None:
    """torch.compile(fullgraph), activation checkpointing, torch.export and TorchScript give the same."""
    torch.manual_seed(9)
    x, merging = torch.randn(2, 7, 6, 8), PatchMerging(3, 8, 5)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), leaf)]

    changed: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "compile": lambda: torch.compile(merging, fullgraph=True, dynamic=True),
        "checkpoint": lambda: lambda y: torch.utils.checkpoint.checkpoint(merging, y, use_reentrant=False),
        "export": lambda: torch.export.export(merging, (x,)).module(),
        "script": lambda: torch.jit.script(merging),
    }
    for got, want in zip(run(changed[mode]()), run(merging), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["default", "reference"])
def test_autocast(low: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    """As LayerNorm and Linear under autocast: products in low precision, gradients in the parameters' types."""
    torch.manual_seed(10)
    merging, x = PatchMerging(2, 16, 24), torch.randn(2, 8, 8, 16).to(dtype).requires_grad_()
    exact = merging(x.float().detach())
    with torch.autocast("cpu", low):
        if backend == "reference":
            with use_backend("reference"):
                out = merging(x)
        else:
            out = merging(x)
    assert out.dtype == low and (out - exact).abs().max() < 0.05
    out.float().square().sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in merging.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(4, 4, 3)}, "x must be"),
        ({"weight": torch.zeros(2, 11)}, r"weight \[Cout, C\*2\*2\], got \[1, 4, 4, 3\] and \[2, 11\]"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"norm_weight": torch.zeros(11)}, r"norm_weight must be \[12\], got \[11\]"),
        ({"norm_bias": torch.zeros(3)}, r"norm_bias must be \[12\], got \[3\]"),
        ({"order": "swin"}, "order must be 'unfold' or 'timm', got 'swin'"),
    ],
)
def test_rejects(change: dict, says: str) -> None:
    arguments = {"x": torch.zeros(1, 4, 4, 3), "weight": torch.zeros(2, 12), "kernel": 2, "stride": 2}
    with pytest.raises(ValueError, match=says):
        ops.patch_merge(**(arguments | {"norm_weight": torch.zeros(12)} | change))


def test_forced_backend_gives_its_reason() -> None:
    with use_backend("cuda"), pytest.raises(af.InputError, match="cannot run patch_merge"):
        ops.patch_merge(*operands(4, 4, 3, 2, 2)[:2], 2, 2, torch.ones(12))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [8, 9])
def test_a_layer_of_16_bits_on_float64(dtype: torch.dtype, outputs: int) -> None:
    """Its bias is of its own type wherever the product is made."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(2, 4, 6, 6).double(),
        torch.randn(outputs, 24).to(dtype),
        torch.randn(outputs).to(dtype),
    )
    found = ops.patch_merge(x, weight, 2, 2, torch.ones(24), torch.zeros(24), bias)
    exact = ops.patch_merge(x, weight.double(), 2, 2, torch.ones(24).double(), torch.zeros(24).double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=5e-2)
