"""Products with packed weights: our kernel for every instruction set, and weights that change after that."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import math
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stacked import EXTENSION, every_isa, needs_extension
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asvit_fast import ops
from asvit_fast.ops import packed_linear

module = importlib.import_module("asvit_fast.ops.linear")
pytestmark = needs_extension

SHAPES = [(1, 1, 1), (5, 7, 3), (13, 300, 37), (64, 96, 88), (400, 17, 130), (770, 96, 16), (3, 1025, 9)]  # rows, K, N
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products take the op as well."""
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    monkeypatch.setattr(module, "ROWS_IN_TRAINING", 0)


@pytest.fixture(params=[packed_linear.OWN, packed_linear.ONEDNN])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries, on any processor."""
    choose = lambda dtype: request.param if dtype == torch.float32 else None  # noqa: E731
    monkeypatch.setattr(packed_linear, "library", choose)
    monkeypatch.setattr(module, "library", choose)
    return request.param


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


# --------------------------------------------------------------------------- weights that change


def step(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "optimizer": step,
    "fused optimizer": lambda layer: torch.optim.AdamW([layer.weight], lr=0.5, foreach=True).step(),
    "in place": lambda layer: layer.weight.mul_(2),
    "a row": lambda layer: layer.weight[3].zero_(),
    "load_state_dict": lambda layer: layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias}),
    "assign": lambda layer: layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias}, assign=True),
    "data in place": lambda layer: layer.weight.data.mul_(1.001),
    "average": lambda layer: layer.weight.data.lerp_(torch.ones_like(layer.weight), 0.01),
    "pruned": lambda layer: layer.weight.data.mul_((torch.rand_like(layer.weight) > 0.3).float()),
    "data replaced": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(2),
    "swapped": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "back and forth": lambda layer: (
        layer.weight.add_(1),
        ops.linear(torch.ones(2, 33), layer.weight),
        layer.weight.sub_(3),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_again(change: str, of: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), layer(x))
        before = layer(x)
        if change == "fused optimizer":
            layer.weight.grad = torch.ones_like(layer.weight)
        CHANGES[change](layer)
        assert not torch.allclose(layer(x), before)
        for _ in range(2):
            torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("shape", [(1024, 4096), (768, 3072), (3072, 768)], ids=str)
def test_a_row_or_column_written_through_data(shape: tuple[int, int], of: str) -> None:
    """As pruning does it; no version counts it."""
    layer, x = nn.Linear(shape[1], shape[0]), torch.randn(8, shape[1])
    for place in ((5,), (slice(None), 7), (shape[0] - 2,), (slice(None), shape[1] - 3)):
        with torch.no_grad():
            ops.linear(x, layer.weight, layer.bias)
            layer.weight.data[place] = 0.5
            torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packed_once(mode: Callable[[], object], of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for as long as the weight lives; copies have their own; nothing is kept where gradients are recorded."""
    calls: list[Tensor] = []
    pack = packed_linear._pack
    monkeypatch.setattr(packed_linear, "_pack", lambda *arguments: calls.append(arguments[0]) or pack(*arguments))
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    ops.linear(x, layer.weight, layer.bias).sum().backward()
    assert packed_linear.kept_of(layer.weight) is None
    calls.clear()
    twin = copy.deepcopy(layer)
    with mode():
        for _ in range(3):
            ops.linear(x, layer.weight, layer.bias)
        assert len(calls) == 1
        torch.testing.assert_close(ops.linear(x, twin.weight, twin.bias), layer(x))
        assert len(calls) == 2
    kept = packed_linear.kept_of(twin.weight)
    assert kept is not None and kept.packed is not None
    packed = weakref.ref(kept.packed[0])
    del twin, layer, kept
    calls.clear()
    gc.collect()
    assert packed() is None


def test_weights_that_are_no_parameters_are_not_kept(of: str) -> None:
    x, weight = torch.randn(6, 33), torch.randn(20, 33)
    with torch.inference_mode():
        made_here = nn.Parameter(torch.randn(20, 33))
        for one in (weight, made_here):
            torch.testing.assert_close(ops.linear(x, one), F.linear(x, one))
            one.mul_(2)
            torch.testing.assert_close(ops.linear(x, one), F.linear(x, one))
            assert packed_linear.kept_of(one) is None


def test_other_shapes_and_a_failure(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that gets other data of another or of the same size, and memory that was not there for a while."""
    layer = nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        for weight in (layer.weight.data, torch.randn(300, 64), layer.weight.data.view(64, 48)):
            layer.weight.data = weight
            x = torch.randn(6, weight.shape[1])
            for _ in range(2):
                torch.testing.assert_close(ops.linear(x, layer.weight), F.linear(x, weight))
        layer.weight.mul_(2)
        with monkeypatch.context() as patched:
            patched.setattr(packed_linear, "_pack", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                ops.linear(x, layer.weight)
        torch.testing.assert_close(ops.linear(x, layer.weight), layer(x))


def test_results_may_be_changed_in_place(of: str) -> None:
    """Also of several leading axes, where torch's own view of a result would refuse it."""
    layer, x, factor = nn.Linear(64, 48), torch.randn(2, 5, 64), torch.tensor(2.0, requires_grad=True)
    for arguments in ((), ("gelu",), ("none", torch.randn(2, 5, 48))):
        with torch.no_grad():
            y = ops.linear(x, layer.weight, layer.bias, *arguments)
        y.mul_(factor).sum().backward()


def test_a_forked_process_does_not_wait_for_threads_of_its_parent(of: str) -> None:
    layer, x = nn.Linear(32, 24), torch.randn(8, 32)
    with torch.no_grad():
        ops.linear(x, layer.weight)
        kept = packed_linear.kept_of(layer.weight)
        assert kept is not None
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with kept.lock:
                held.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            ops.linear(x, layer.weight)
            os._exit(0)
        done.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0


def packed_layer() -> tuple[nn.Linear, Tensor]:
    layer, x = nn.Linear(64, 48), torch.randn(8, 64)
    with torch.no_grad():
        ops.linear(x, layer.weight, layer.bias)
    assert packed_linear.kept_of(layer.weight) is not None
    return layer, x


def assert_current(layer: nn.Linear, x: Tensor) -> None:
    with torch.no_grad():
        found = ops.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_a_step_of_an_optimizer(kind: type[torch.optim.Optimizer], how: str, of: str) -> None:
    """Also where it changes a few numbers only, and counts no version."""
    layer, x = packed_layer()
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.weight.grad[7, 30] = 1.0
    kind([layer.weight], lr=1.0, weight_decay=0.0, **{how: True}).step()  # type: ignore[call-arg]
    assert_current(layer, x)


def test_torch_may_swap_it(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = packed_layer()
    other = nn.Parameter(torch.randn(48, 64))
    torch.utils.swap_tensors(layer.weight, other)
    assert_current(layer, x)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    layer.double()
    layer.float()
    layer.load_state_dict(nn.Linear(64, 48).state_dict())
    assert_current(layer, x)


def test_copies_and_files_have_none(of: str) -> None:
    layer, x = packed_layer()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer.weight)):
        weight = twin.weight if isinstance(twin, nn.Linear) else twin
        assert packed_linear.kept_of(weight) is None
    saved = io.BytesIO()
    torch.save({"weight": layer.weight}, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=True)["weight"], layer.weight)
    assert_current(layer, x)


def test_another_default_device(of: str) -> None:
    layer, x = nn.Linear(64, 48), torch.randn(8, 64)
    with torch.device("meta"), torch.no_grad():
        assert ops.linear(x, layer.weight).device.type == "cpu"
    assert_current(layer, x)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = args[0], 2.0 * args[1], *args[2:]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_function_modes_see_it(grad: bool, of: str) -> None:
    layer, x = packed_layer()
    with torch.set_grad_enabled(grad):
        expected = F.linear(x, 2.0 * layer.weight, layer.bias)
        with Doubled():
            torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), expected)


def test_an_interruption_loses_no_change(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(32, 24), torch.randn(8, 32)
    with torch.no_grad():
        ops.linear(x, layer.weight)
        layer.weight.mul_(2.0)
        with monkeypatch.context() as patch:
            patch.setattr(packed_linear, "_pack", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ops.linear(x, layer.weight)
        assert torch.allclose(ops.linear(x, layer.weight), F.linear(x, layer.weight), atol=1e-4)


def interrupted(*arguments: object) -> Tensor:
    raise KeyboardInterrupt


def test_threads_share_a_weight(of: str) -> None:
    layers, x = [nn.Linear(64, 48) for _ in range(8)], torch.randn(50, 64)

    def run(_: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(ops.linear(x, one.weight, one.bias), one(x), atol=1e-5) for one in layers)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


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
