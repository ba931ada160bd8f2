"""Products with packed weights: our kernel for every instruction set, and numbers of 16 bits."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from stacked import EXTENSION, every_isa, needs_extension
from torch import Tensor, nn

from asvit_fast import ops
from asvit_fast.ops import packed_linear

module = importlib.import_module("asvit_fast.ops.linear")
pytestmark = [needs_extension, pytest.mark.usefixtures("products_of_any_size")]

SHAPES = [(1, 1, 1), (5, 7, 3), (13, 300, 37), (64, 96, 88), (400, 17, 130), (770, 96, 16), (3, 1025, 9)]  # rows, K, N
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def compiled(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    packed = torch.ops.asvit_fast_C.linear_pack(weight)
    return torch.ops.asvit_fast_C.linear(x, packed, weight.shape[0], bias, residual, activation)


def error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item()


# --------------------------------------------------------------------------- the kernel


@every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, activation: str, isa: str, poison_empty: None) -> None:
    """Against float64, with every combination of bias and residual."""
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    for bias in (None, torch.randn(outputs).to(dtype)):
        for residual in (None, torch.randn(rows, outputs).to(dtype)):
            operands = (x, weight, bias, activation, residual)
            wide = (value.double() if isinstance(value, Tensor) else value for value in operands)
            exact, eager = module.linear_reference(*wide), module.linear_reference(*operands)
            found = compiled(x, weight, bias, residual, activation)
            assert found.dtype == dtype and found.shape == (rows, outputs)
            assert error(found, exact) < 2 * error(eager, exact) + 1e-6


@every_isa
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_numbers_of_16_bits(dtype: torch.dtype, isa: str) -> None:
    """All of them are read, and sums of two are rounded, as torch does: the nearest one, of two the even one. To
    instructions for bfloat16 what is less than any normal number is 0, in torch's products as well."""
    numbers = torch.arange(65536).to(torch.uint16).view(dtype)

    def as_read(x: Tensor) -> Tensor:
        flushes = isa == "avx512bf16" and dtype == torch.bfloat16
        return torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x) if flushes else x

    numbers = as_read(numbers)
    read = compiled(numbers[:, None], torch.ones(1, 1, dtype=dtype), None, None, "none")[:, 0]
    torch.testing.assert_close(read, numbers, rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    near = numbers.float().abs().mul(torch.finfo(dtype).eps).to(dtype)  # about half of the distance of neighbours
    pairs = torch.cat([torch.stack([numbers, near * sign], 1) for sign in (-0.75, -0.5, 0.25, 0.5, 0.75)])
    pairs = as_read(torch.cat([pairs, torch.stack([numbers, numbers[torch.randperm(65536)]], 1)]))
    found = compiled(pairs, torch.ones(1, 2, dtype=dtype), None, None, "none")[:, 0]
    want = as_read((pairs[:, 0].float() + pairs[:, 1].float()).to(dtype))
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@every_isa
def test_strides_leading_axes_and_threads(isa: str) -> None:
    """Rows and weights of any strides; the bits do not depend on the number of threads."""
    torch.manual_seed(0)
    x, weight = torch.randn(96, 5, 200).permute(1, 2, 0), torch.randn(96, 80).t()
    bias, residual = torch.randn(80), torch.randn(5, 80, 200).transpose(1, 2)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(compiled(x, weight, bias, residual, "gelu"))
        torch.set_num_threads(before)
    want = module.linear_reference(x, weight, bias, "gelu", residual)
    torch.testing.assert_close(results[0], want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)


def test_gelu_of_any_number() -> None:
    """The tails have their relative accuracy; infinities and NaN are those of torch."""
    numbers = [-math.inf, -1e30, -40.0, -12.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 40.0, 1e30, math.inf, math.nan]
    x = torch.tensor(numbers)
    found = compiled(x[:, None], torch.ones(1, 1), None, None, "gelu")[:, 0]
    want = 0.5 * x.double() * torch.erfc(-x.double() / 2**0.5)  # -inf gives NaN
    torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=1e-300, equal_nan=True)
    grid = torch.linspace(-9, 9, 20001)
    found = compiled(grid[:, None], torch.ones(1, 1), None, None, "gelu")[:, 0]
    assert error(found, F.gelu(grid.double())) < 2 * error(F.gelu(grid), F.gelu(grid.double()))


@every_isa
def test_gelu_of_every_bfloat16(isa: str) -> None:
    """Little more than half of a unit in the last place is lost, whatever the number."""
    x = torch.arange(65536).to(torch.uint16).view(torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    found = compiled(torch.stack([x, torch.zeros_like(x)], 1)[x.isfinite()], weight, None, None, "gelu")[:, 0].double()
    finite = x[x.isfinite()].double()
    exact = 0.5 * finite * torch.erfc(-finite / 2**0.5)
    torch.testing.assert_close(found, exact, rtol=0.55 * torch.finfo(torch.bfloat16).eps, atol=1.2e-38)


@pytest.mark.parametrize("rows", [1, 150, 289])
def test_more_threads_than_rows(rows: int) -> None:
    """No tile is empty."""
    x, weight, before = torch.randn(rows, 768), torch.randn(256, 768), torch.get_num_threads()
    torch.set_num_threads(200)
    try:
        found = compiled(x, weight, None, None, "none")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_weight_is_packed_for_each_instruction_set(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pack in other orders, of the same size."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: packed_linear.OWN)
    layer, x = nn.Linear(96, 96).to(dtype), torch.randn(200, 96).to(dtype)
    before = EXTENSION.get_isa()
    try:
        with torch.no_grad():
            for isa in (*EXTENSION.available_isas(), *EXTENSION.available_isas()):
                EXTENSION.set_isa(isa)
                found = ops.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=1e-2)
    finally:
        EXTENSION.set_isa(before)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_in_16_bits(dtype: torch.dtype, autocast: bool) -> None:
    layer, x = nn.Linear(96, 96), torch.randn(200, 96)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    run = torch.compile(lambda x: ops.linear(x, layer.weight, layer.bias, "gelu"), fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else dtype, enabled=autocast):
        torch.testing.assert_close(run(x), F.gelu(F.linear(x, layer.weight, layer.bias)), rtol=2e-2, atol=1e-2)


@every_isa
@pytest.mark.parametrize("inputs", [34, 33])
def test_bfloat16_of_any_strides(inputs: int, isa: str) -> None:
    """Two numbers of a row are one operand: rows may begin anywhere, and end with a single number."""
    torch.manual_seed(0)
    x = torch.randn(40, 37).bfloat16()[:, 2 : 2 + inputs]  # rows an odd distance apart
    weight = torch.randn(inputs, 70).bfloat16().t()
    exact, eager = x.double() @ weight.double().t(), x @ weight.t()
    for rows in (x, x.t().contiguous().t(), x[::2], x[:1], torch.cat([x, x], 1)[:, :inputs]):
        found = compiled(rows, weight, None, None, "none")
        want = exact[: rows.shape[0]] if rows.shape[0] != 20 else exact[::2]
        assert error(found, want) < 2 * error(eager, exact)


def test_what_does_not_fit_is_named() -> None:
    packed = torch.ops.asvit_fast_C.linear_pack(torch.randn(3, 4))
    x = torch.randn(2, 4)
    for arguments, words in (
        ((x, packed, 300, None, None, "none"), "packed is not what linear_pack makes of a weight"),
        ((x, packed, 3, torch.randn(4), None, "none"), "bias must be"),
        ((x, packed, 3, None, torch.randn(2, 4), "none"), "residual must be"),
        ((x, packed, 3, None, None, "relu"), "must be none or gelu"),
        ((x.double(), packed, 3, None, None, "none"), "must be float32, bfloat16 or float16"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            torch.ops.asvit_fast_C.linear(*arguments)


# --------------------------------------------------------------------------- 16 bits without products of them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened by our kernel, forward and backward, under autocast as well; the error rule holds."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: None if dtype == torch.float64 else packed_linear.OWN)
    torch.manual_seed(0)
    x, layer = torch.randn(40, 33, requires_grad=True), nn.Linear(33, 20)
    wide = copy.deepcopy(layer).double()
    rounded = x.to(dtype).double().detach().requires_grad_()
    wide.load_state_dict({name: value.to(dtype).double() for name, value in layer.state_dict().items()})
    cotangent = torch.randn(40, 20).to(dtype)
    exact = [(y := wide(rounded)), *torch.autograd.grad(y, [rounded, *wide.parameters()], cotangent.double())]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        if autocast:
            with torch.autocast("cpu", dtype):
                y = function(x, layer.weight, layer.bias)
            parameters = [x, layer.weight, layer.bias]
        else:
            parameters = [t.detach().to(dtype).requires_grad_() for t in (x, layer.weight, layer.bias)]
            y = function(*parameters)
        return [y, *torch.autograd.grad(y, parameters, cotangent)]

    found, eager = run(ops.linear), run(F.linear)
    assert [t.dtype for t in found] == [t.dtype for t in eager]
    for a, b, c in zip(found, eager, exact, strict=True):
        assert error(a, c) < 2 * error(b, c) + 1e-6
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        inputs = (
            (x, layer.weight, layer.bias) if autocast else tuple(t.to(dtype) for t in (x, layer.weight, layer.bias))
        )
        assert error(ops.linear(*inputs), exact[0]) < 2 * error(eager[0], exact[0]) + 1e-6
        residual = torch.randn(40, 20).to(inputs[0].dtype)
        assert ops.linear(*inputs, residual=residual).dtype == residual.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autocast_keeps_rounded_weights(
    dtype: torch.dtype, mode: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a weight in float32, once for each type; a residual in that type is added in the product, another apart."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: None if dtype == torch.float64 else packed_linear.OWN)
    calls: list[Tensor] = []
    pack = packed_linear._pack
    monkeypatch.setattr(packed_linear, "_pack", lambda *arguments: calls.append(arguments[0]) or pack(*arguments))
    torch.manual_seed(0)
    layer, x, residual = nn.Linear(33, 20), torch.randn(6, 33), torch.randn(6, 20)
    with mode(), torch.autocast("cpu", dtype):
        y = [ops.linear(given, layer.weight, layer.bias, "gelu") for given in (x, x.to(dtype))]
        assert len(calls) == 1 and y[0].dtype == dtype and torch.equal(*y)
        near = 4 * torch.finfo(dtype).eps  # as torch's sums are rounded before GELU
        torch.testing.assert_close(y[0], F.gelu(layer(x)), rtol=near, atol=near)
        apart = ops.linear(x, layer.weight, layer.bias, "gelu", residual)
        assert torch.equal(apart, residual + y[0]) and apart.dtype == torch.float32
        together = ops.linear(x, layer.weight, layer.bias, "gelu", residual.to(dtype))
        assert together.dtype == dtype and len(calls) == 1
        torch.testing.assert_close(together, residual.to(dtype) + y[0], rtol=near, atol=near)
    with mode():
        torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), layer(x))
    assert len(calls) == 2


@pytest.mark.parametrize("half", [None, packed_linear.OWN], ids=["torch", "own"])
@pytest.mark.parametrize("small", [False, True])
def test_autocast_has_torchs_types(half: str | None, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever multiplies: a residual is added in the wider of the two types, not in the product's."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: packed_linear.ONEDNN if dtype == torch.float32 else half)
    if small:
        monkeypatch.setattr(module, "SMALL_FOR_OURS", 10**9)
        monkeypatch.setattr(module, "SMALL", 10**9)
    torch.manual_seed(0)
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    for grads in (True, False):
        with torch.set_grad_enabled(grads), torch.autocast("cpu", torch.bfloat16):
            for given in (x, x.bfloat16()):
                for residual in (torch.randn(6, 20) * 100, torch.randn(6, 20).bfloat16(), None):
                    operands = (given, layer.weight, layer.bias, "none", residual)
                    found, want = ops.linear(*operands), module.linear_reference(*operands)
                    assert found.dtype == want.dtype
                    torch.testing.assert_close(found, want, rtol=1e-2, atol=2e-2)


def test_threads_of_two_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """One under autocast, one not: neither gets what the other packed."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: None if dtype == torch.float64 else packed_linear.OWN)
    layer, x = nn.Linear(64, 48), torch.randn(50, 64)
    with torch.no_grad():
        want = [
            F.linear(x, layer.weight, layer.bias),
            F.linear(x.bfloat16(), *(p.bfloat16() for p in layer.parameters())),
        ]

    def run(index: int) -> bool:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 1):
            y = ops.linear(x, layer.weight, layer.bias)
        near = 1e-5 if index % 2 == 0 else 2e-2
        return y.dtype == want[index % 2].dtype and torch.allclose(y, want[index % 2], rtol=near, atol=near)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(400)))


# --------------------------------------------------------------------------- 16 bits with products of them


def has_products(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and packed_linear._multiplied_by_onednn(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_alone_packs_for_onednn(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies where a gradient is recorded, where it calls oneDNN as well."""
    products: list[bool] = []

    def product(x: Tensor, weight: Tensor, *_: object, keep: bool, by: str) -> Tensor:
        products.append(keep)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: packed_linear.ONEDNN)
    monkeypatch.setattr(module, "product", product)
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = ops.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(x))
        assert y.requires_grad and not products
        with torch.no_grad():
            assert ops.linear(x, layer.weight, layer.bias).dtype == dtype
    assert products == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_onednn_in_sixteen_bits(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every combination of activation and residual, where the processor has the instructions."""
    if not has_products(dtype):
        pytest.skip(f"no products in {dtype} on this processor")
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: packed_linear.ONEDNN)
    torch.manual_seed(0)
    layer, x, residual = nn.Linear(33, 20), torch.randn(40, 33), torch.randn(40, 20).to(dtype)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    rounded = [one.detach().to(dtype) for one in (x, layer.weight, layer.bias)]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        for activation in ("none", "gelu"):
            for added in (None, residual):
                wide = [one.double() for one in rounded], None if added is None else added.double()
                exact = module.linear_reference(*wide[0], activation, wide[1])
                eager = module.linear_reference(*rounded, activation, added)
                found = ops.linear(x, layer.weight, layer.bias, activation, added)
                assert found.dtype == dtype and error(found, exact) < 2 * error(eager, exact) + 1e-6
