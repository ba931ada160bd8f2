"""asvit_fast.use_backend: what it forces, where it holds, and what it refuses."""

from __future__ import annotations

import threading

import pytest
import torch

import asvit_fast as af
from asvit_fast import _extension, backends, ops
from asvit_fast.errors import InputError


def attention(qkv: torch.Tensor) -> torch.Tensor:
    return ops.window_attention(qkv, 2, (4, 4), (1, 2))


def test_public_and_nested():
    assert af.use_backend is backends.use_backend and backends.forced_backend() is None
    with af.use_backend("reference"):
        with af.use_backend("cpu"):
            assert backends.forced_backend() == "cpu"
        with pytest.raises(InputError), af.use_backend("triton"):
            attention(torch.randn(1, 8, 8, 12))
        assert backends.forced_backend() == "reference"
    assert backends.forced_backend() is None


def test_decorates():
    assert af.use_backend("reference")(backends.forced_backend)() == "reference"


@pytest.mark.parametrize(
    ("driver", "capability", "expected"),
    [
        (13000, (9, 0), None),
        (13020, (9, 0), None),
        (12080, (9, 0), "the driver of the GPU knows CUDA 12: update it"),
        (0, (9, 0), "the driver of the GPU knows CUDA 0"),
        (13000, (7, 5), "compiled for 9.0, the GPU is 7.5"),
    ],
)
def test_cuda_kernels_need_a_driver_and_a_gpu(monkeypatch, driver, capability, expected):
    """Everything that is asked before a CUDA kernel runs, on a machine without one: torch has no function for it."""

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, pointer):
            pointer._obj.value = driver
            return 0

    monkeypatch.setattr(backends.ctypes, "CDLL", Driver)
    monkeypatch.setattr(_extension, "cuda_reason", lambda: None)
    monkeypatch.setattr(_extension, "build_report", lambda: {"cuda": "13.0", "archs": ["9.0"]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    found = backends._cuda_reason(0)
    assert found is expected if expected is None else expected in found


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_cannot_run_says_why(backend):
    qkv = torch.randn(1, 8, 8, 12)
    with (
        af.use_backend(backend),
        pytest.raises(InputError, match=f"backend '{backend}' cannot run window_attention on cpu"),
    ):
        attention(qkv)
    attention(qkv)
    with pytest.raises(InputError, match="unknown backend 'fast'"), af.use_backend("fast"):
        pass


def test_other_threads_keep_their_own():
    """Blocks of two threads that overlap in time, in both orders of leaving."""
    seen, inside, leave = {}, threading.Barrier(2), threading.Barrier(2)

    def work(backend: str, last: bool) -> None:
        with af.use_backend(backend):
            inside.wait()
            seen[backend] = backends.forced_backend()
            if last:
                leave.wait()
        if not last:
            leave.wait()
        seen[f"{backend} after"] = backends.forced_backend()

    threads = [threading.Thread(target=work, args=arguments) for arguments in (("reference", True), ("cpu", False))]
    for thread in threads:
        thread.start()
    assert backends.forced_backend() is None
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "cpu": "cpu", "reference after": None, "cpu after": None}


def test_scores_in_threads_obey(monkeypatch, two_threads):
    """The networks of a score run in threads of their own."""
    if _extension.reason() is not None:
        pytest.skip(_extension.reason())
    seen = set()
    reference = backends._implementations["gelu_taylor"]["reference"]

    def noted(*arguments):
        seen.add(threading.current_thread().name)
        return reference(*arguments)

    monkeypatch.setitem(backends._implementations["gelu_taylor"], "reference", noted)
    settings = {"img_size": 32, "repeats": 2, "batch": 2, "thetas": 2, "metrics": ("length_distortion",)}
    with af.use_backend("reference"):
        af.score("4,1,2|2,1,2|2,1,2|2,1,2|16", **settings)
    assert seen and threading.current_thread().name not in seen


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_models_obey_when_they_run(compiler, monkeypatch):
    """One graph, compiled once, runs the backend that is forced at the time, and gives its gradients."""
    calls = []
    reference = backends._implementations["window_attention"]["reference"]
    monkeypatch.setitem(
        backends._implementations["window_attention"],
        "reference",
        lambda *a: calls.append("reference") or reference(*a),
    )
    torch._dynamo.reset()

    def loss(qkv: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return attention(qkv).square().sum() + ops.patch_merge(x, weight, 2, 2, norm).square().sum()

    leaves = [torch.randn(shape, requires_grad=True) for shape in ((1, 8, 9, 12), (1, 6, 7, 4), (8, 16), (16,))]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for backend in (None, "reference", None):
        calls.clear()
        with torch._dynamo.config.patch(error_on_recompile=backend is not None):
            if backend is None:
                found = torch.autograd.grad(compiled(*leaves), leaves)
            else:
                with af.use_backend(backend):
                    found = torch.autograd.grad(compiled(*leaves), leaves)
        if _extension.reason() is None:
            assert ("reference" in calls) == (backend == "reference")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_inside_a_compiled_function_is_refused():
    def inner(x: torch.Tensor) -> torch.Tensor:
        with af.use_backend("reference"):
            return x + 1

    with pytest.raises(Exception, match="put the call into the block instead"):
        torch.compile(inner, fullgraph=True, backend="eager")(torch.ones(2))


def test_statistics_of_the_reference_are_those_of_the_kernels():
    """A backward pass may run another backend than the forward pass did."""
    if _extension.reason() is not None:
        pytest.skip(_extension.reason())
    torch.manual_seed(0)
    qkv, bias = torch.randn(2, 7, 9, 12, dtype=torch.double), torch.randn(2, 16, 16, dtype=torch.double)
    x, weight, norm = (torch.randn(shape, dtype=torch.double) for shape in ((2, 5, 6, 4), (8, 36), (36,)))
    for layout in ("masked", "timm", "torchvision"):
        attend = (qkv, None, None, bias, None, None, None, 2, [4, 4], [1, 2], [4, 4], 0.5, layout, 0.0)
        results = []
        for backend in ("cpu", "reference"):
            with af.use_backend(backend):
                results += [
                    torch.ops.asvit_fast.window_attention(*attend),
                    torch.ops.asvit_fast.patch_merge(x, weight, norm, None, None, 3, 2, 1e-5, False),
                ]
        torch.testing.assert_close(results[:2], results[2:])
