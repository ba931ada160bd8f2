"""ops.linear against torch's own function: values, gradients of every order, and what must not reach oneDNN."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from stacked import needs_extension
from torch import Tensor

from asvit_fast import InputError, accelerate, nn, ops
from asvit_fast.backends import use_backend

module = importlib.import_module("asvit_fast.ops.linear")

OF_LIBRARIES = [False, True]  # weight gradients are MKL's or oneDNN's: the processor decides
SHAPES = [((7, 5), 3), ((2, 3, 4, 33), 65), ((1, 1), 1), ((300, 64), 192), ((400, 16), 48), ((0, 8), 4), ((5, 129), 16)]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products take the op as well."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    monkeypatch.setattr(module, "ROWS_IN_TRAINING", 0)


def operands(shape: tuple[int, ...], features: int, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape), torch.randn(features, shape[-1]) / shape[-1] ** 0.5]
    return [tensor.requires_grad_() for tensor in [*tensors, torch.randn(features)][: 3 if bias else 2]]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a.double() - b).abs().max().item() for a, b in zip(found, exact, strict=True) if b.numel()), default=0)


@needs_extension
@pytest.mark.parametrize(("shape", "features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("narrow", OF_LIBRARIES)
def test_values_and_gradients(
    shape: tuple[int, ...],
    features: int,
    bias: bool,
    activation: str,
    narrow: bool,
    poison_empty: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "mkl_is_narrow", lambda: narrow)
    tensors = operands(shape, features, bias)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def both(function, tensors: list[Tensor]) -> list[Tensor]:
        y = function(*tensors, activation=activation)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        return [y, *torch.autograd.grad(y, tensors, cotangent)]

    exact = both(module.linear_reference, wide)
    found, eager = both(ops.linear, tensors), both(module.linear_reference, tensors)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in exact]
    assert error(found, exact) < 2 * error(eager, exact) + 1e-6
    with torch.no_grad():  # the activation is part of the product
        assert error([ops.linear(*tensors, activation=activation)], exact[:1]) < 2 * error(eager[:1], exact[:1]) + 1e-6


@needs_extension
def test_strided_operands_and_no_bias() -> None:
    x, weight = torch.randn(64, 40).t(), torch.randn(64, 24).t()
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    rows = torch.randn(4, 6, 2, 64)[:, :, 0]
    torch.testing.assert_close(ops.linear(rows, weight), rows @ weight.t(), rtol=1e-5, atol=1e-5)


@needs_extension
def test_double_backward_and_partial_gradients() -> None:
    tensors = operands((6, 4), 5)
    weight_only = ops.linear(tensors[0].detach(), tensors[1]).square().sum()
    assert torch.autograd.grad(weight_only, tensors[1])[0].shape == (5, 4)

    def second(function) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)

    for found, want in zip(second(ops.linear), second(F.linear), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@needs_extension
def test_opcheck() -> None:
    for bias in (True, False):
        tensors = operands((6, 4), 5, bias)
        arguments = (*tensors, *([] if bias else [None]), None, "none")
        torch.library.opcheck(torch.ops.asvit_fast.linear.default, arguments)


@needs_extension
def test_compile_and_export() -> None:
    layer = nn.Linear(32, 16)
    x = torch.randn(8, 4, 32, requires_grad=True)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@needs_extension
def test_compile_where_ci_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor refuses there to call ops with decompositions that it was not told to keep."""
    from torch._inductor import config, lowering

    monkeypatch.setenv("CI", "true")
    monkeypatch.delitem(lowering.lowerings, torch.ops.asvit_fast.linear.default, raising=False)
    torch._dynamo.reset()
    layer = nn.Linear(48, 16)
    x = torch.randn(8, 4, 48)
    with config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), F.linear(x, layer.weight, layer.bias))


def test_transforms_take_torchs_own() -> None:
    x, weight, bias = operands((6, 4), 5)
    want = torch.func.jvp(F.linear, (x, weight, bias), (x, weight, bias))
    torch.testing.assert_close(torch.func.jvp(ops.linear, (x, weight, bias), (x, weight, bias)), want)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, row: ops.linear(row, w).sum()), (None, 0))
    torch.testing.assert_close(per_sample(weight, x[:, None]), x[:, None].expand(6, 5, 4))


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and autocast that no library of ours is for, a forced reference and small products."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a library was called")

    x, weight, bias = (tensor.detach() for tensor in operands((6, 4), 5))
    monkeypatch.setattr(module, "product", refuse)
    monkeypatch.setattr(module, "library", lambda dtype: "onednn" if dtype == torch.float32 else None)
    assert ops.linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert ops.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    with use_backend("reference"):
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(module, "SMALL", 10**7)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    for grads in (True, False):
        with torch.set_grad_enabled(grads), pytest.raises(InputError, match="weight must be a tensor"):
            ops.linear(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none or gelu, got 'relu'"):
        ops.linear(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"residual must be \[6, 5\], got \[5\]"):
        ops.linear(x, weight, bias, residual=bias)


def test_other_layouts_of_bias_and_residual_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    x, weight, bias, residual = torch.ones(6, 4), nn.Linear(4, 5).weight, torch.ones(5), torch.ones(6, 5)
    with torch.no_grad():
        for added in ({"bias": bias.to_sparse()}, {"residual": residual.to_sparse()}):
            dense = {name: value.to_dense() for name, value in added.items()}
            try:
                expected = module.linear_reference(x, weight, **added)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    ops.linear(x, weight, **added)
            else:
                torch.testing.assert_close(ops.linear(x, weight, **added).to_dense(), expected.to_dense())
            torch.testing.assert_close(ops.linear(x, weight, **dense), module.linear_reference(x, weight, **dense))
        with pytest.raises(InputError, match="bias must be on cpu, got one on meta"):
            ops.linear(x, weight, bias.to("meta"))


@pytest.mark.parametrize("make", ["nested", "sparse", "csr", "mkldnn"])
def test_other_layouts_are_torchs(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size, in inference as well, where fewer questions are asked."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    given = {
        "nested": lambda: torch.nested.nested_tensor([x[:2], x[2:]]),
        "sparse": x.to_sparse,
        "csr": x.to_sparse_csr,
        "mkldnn": x.to_mkldnn,
    }[make]()
    with torch.no_grad():
        found, want = (f(given, layer.weight, layer.bias) for f in (ops.linear, F.linear))
    assert found.layout == want.layout and found.is_nested == want.is_nested
    for a, b in zip(*(y.unbind() if y.is_nested else [y.to_dense()] for y in (found, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_few_rows_in_training_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As packing costs what our kernel gains; in inference packed weights are kept."""
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    monkeypatch.setattr(module, "library", lambda dtype: "own")
    monkeypatch.setattr(module, "ROWS_IN_TRAINING", 10)
    calls: list[int] = []
    monkeypatch.setattr(module, "product", lambda x, *_, **__: calls.append(len(x)) or x.new_zeros(len(x), 3))
    x, weight, bias = operands((9, 5), 3)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert not calls
    many = operands((10, 5), 3)
    ops.linear(*many)
    assert calls == [10]
    with torch.no_grad():
        ops.linear(x, torch.nn.Parameter(weight), bias)
    assert calls == [10, 9]


def test_residual() -> None:
    """Added in the product where no gradient is recorded, and with its gradient where one is."""
    tensors = operands((7, 5), 3)
    residual = torch.randn(7, 3, requires_grad=True)
    for activation in ("none", "gelu"):
        want = module.linear_reference(*tensors, activation, residual)
        found = ops.linear(*tensors, activation, residual)
        torch.testing.assert_close(found, want)
        with torch.no_grad():
            torch.testing.assert_close(ops.linear(*tensors, activation, residual), want)
        cotangent = torch.randn(7, 3)
        for a, b in zip(*(torch.autograd.grad(y, [*tensors, residual], cotangent) for y in (found, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_mode_under_autocast(dtype: torch.dtype) -> None:
    """LayerNorm gives values of 16 bits tangents of 32."""
    layers = torch.nn.Linear(96, 96), torch.nn.LayerNorm(96), torch.nn.Linear(96, 288)
    network, x = torch.nn.Sequential(*layers), torch.randn(2, 300, 96)
    with torch.autocast("cpu", dtype):
        want = torch.func.jvp(network, (x,), (x,))
        accelerate(network)
        found = torch.func.jvp(network, (x,), (x,))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
