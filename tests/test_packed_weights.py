"""Packed weights that are kept: as long as they live, and until they change."""

from __future__ import annotations

import copy
import gc
import importlib
import io
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
from stacked import needs_extension
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from asvit_fast import ops
from asvit_fast.ops import packed_linear

module = importlib.import_module("asvit_fast.ops.linear")
pytestmark = [needs_extension, pytest.mark.usefixtures("products_of_any_size")]


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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_graphs_compiled_for_inference(change: str, backend: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They pack once, and again after a change; those that record gradients keep nothing."""
    if backend == "inductor" and change not in ("optimizer", "data replaced"):
        pytest.skip("compiling takes a second")
    calls: list[Tensor] = []
    pack = packed_linear._pack
    monkeypatch.setattr(packed_linear, "_pack", lambda *arguments: calls.append(arguments[0]) or pack(*arguments))
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    run = torch.compile(lambda x: ops.linear(x, layer.weight, layer.bias, "gelu"), fullgraph=True, backend=backend)
    run(x).sum().backward()
    assert packed_linear.kept_of(layer.weight) is None
    calls.clear()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(run(x), F.gelu(layer(x)))
        assert len(calls) == 1
        before = layer(x)
        layer.weight.grad = torch.ones_like(layer.weight)
        CHANGES[change](layer)
        assert not torch.allclose(layer(x), before)
        for _ in range(2):
            torch.testing.assert_close(run(x), F.gelu(layer(x)))


@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_compiled_for_inference_in_16_bits(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's products, which pack every time, are as fast."""
    for place in (packed_linear, module):
        monkeypatch.setattr(place, "library", lambda dtype: None if dtype == torch.float64 else packed_linear.OWN)
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = nn.Linear(33, 20), torch.randn(6, 33)
    layer, x = (layer, x) if autocast else (layer.bfloat16(), x.bfloat16())
    run = torch.compile(lambda x: ops.linear(x, layer.weight, layer.bias, "gelu"), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x)
        kept = packed_linear.kept_of(layer.weight)
        assert y.dtype == torch.bfloat16 and kept is not None and kept.packed is not None
        assert kept.packed[3] == torch.bfloat16
        torch.testing.assert_close(y, F.gelu(layer(x)), rtol=3e-2, atol=1e-2)


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


def test_a_step_of_an_optimizer_that_has_a_flat_buffer(of: str) -> None:
    """Of which weights are views, with versions of their own."""
    layer, x = packed_layer()
    flat = nn.Parameter(torch.cat([torch.ones(5), layer.weight.detach().flatten()]))
    layer.weight.data = flat.data[5:].view_as(layer.weight)
    assert_current(layer, x)
    flat.grad = torch.zeros_like(flat)
    flat.grad[-7] = 1.0
    torch.optim.SGD([flat], lr=1.0).step()
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
