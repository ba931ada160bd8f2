"""Ops on a GPU as programs use it: every kernel against float64, on streams, in graphs, twice, and in a benchmark.

The cases (op_cases.py) run on the CPU as well; what there is no GPU for to see is skipped, or fails with
ASVIT_FAST_REQUIRE_GPU=1.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from accuracy import TINY
from op_cases import CASES, DTYPES, OpCase, case
from torch import Tensor

from asvit_fast import backends
from asvit_fast.bench import timer
from asvit_fast.bench.operators import Case, Work

every_case = pytest.mark.parametrize("one", CASES, ids=str)
CUDA = torch.device("cuda")
OURS = [one for one in CASES if one.backend != "reference"]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Up to rounding: operations of torch's may sum in another order."""
    for a, b in zip(found, expected, strict=True):
        wide = b.double()
        error, allowed = (a.double() - wide).abs().max().item(), 2 * TINY[b.dtype] * max(1.0, wide.abs().max().item())
        assert a.dtype == b.dtype and error < allowed, f"{tuple(b.shape)}: {error:.1e}, allowed is {allowed:.1e}"


# --------------------------------------------------------------------------- numbers


@every_case
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_against_float64(one: OpCase, dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    one.check(dtype, device)


@every_case
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_twice_the_same_bits(one: OpCase, dtype: torch.dtype, device: torch.device, repeatable_float32: None) -> None:
    operands = one.operands(dtype, device)
    assert all(map(torch.equal, one.both(operands), one.both(operands)))


def test_every_kernel_has_a_case() -> None:
    """Triton kernels by what the cases start, CUDA kernels by the ops that have them."""
    pytest.importorskip("triton")
    import triton
    from triton_cases import launches_of

    from asvit_fast import kernels

    def both(one: OpCase) -> list[Tensor]:
        return one.both(one.operands(torch.bfloat16, torch.device("cpu")))

    started = {x.name for one in OURS if one.backend == "triton" for x in launches_of(lambda one=one: both(one), 90)}
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    exist = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    assert exist == started
    declared = {(op, backend) for op, names in backends.declared().items() for backend in names}
    ours = {(op, backend) for op, backend in declared if backend in ("triton", "cuda")}
    assert ours == {(one.op, one.backend) for one in OURS}


def test_program() -> None:
    """What a sanitizer runs."""
    command = [sys.executable, "tests/op_cases.py", "--device", "cpu", "--dtype", "bfloat16", "--case", "tanh_taylor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("1 ok, 0 wrong\n"), done.stderr


# --------------------------------------------------------------------------- streams


def written_late(operands: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """New values for operands, on the current stream and after a while: a kernel on another stream reads the old."""
    torch.cuda._sleep(30_000_000)  # clock cycles: a few hundredths of a second
    for operand, value in zip(operands, values, strict=True):
        operand.copy_(value)


@pytest.mark.gpu
@every_case
def test_on_a_stream_of_its_own(one: OpCase) -> None:
    """Forward and backward run where they are called."""
    values, operands = (one.operands(torch.bfloat16, CUDA, seed) for seed in (1, 2))
    expected = one.both(values)
    one.both(operands)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        written_late(operands, values)
        found = one.both(operands)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_on_several_streams(dtype: torch.dtype) -> None:
    """All ops at once, each case on a stream of its own, several times: nobody uses the memory of another."""
    operands = {one.name: one.operands(dtype, CUDA) for one in CASES}
    expected = {one.name: one.both(operands[one.name]) for one in CASES}
    streams = {one.name: torch.cuda.Stream() for one in CASES}
    found: dict[str, list[list[Tensor]]] = {one.name: [] for one in CASES}
    torch.cuda.synchronize()
    for _ in range(4):
        for one in CASES:
            with torch.cuda.stream(streams[one.name]):
                found[one.name].append(one.both(operands[one.name]))
    torch.cuda.synchronize()
    for name, results in found.items():
        for result in results:
            assert_close(result, expected[name])


# --------------------------------------------------------------------------- graphs


@pytest.mark.gpu
@every_case
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_captured_and_replayed(one: OpCase, both: bool, dtype: torch.dtype) -> None:
    """A graph reads new values where it has read the old."""
    run = one.both if both else one.forward
    operands, values = (one.operands(dtype, CUDA, seed) for seed in (1, 2))
    expected = run(values)
    result: list[Tensor] = []

    def call() -> None:
        result[:] = run(operands)

    graph = timer.captured(call, CUDA)
    for operand, value in zip(operands, values, strict=True):
        operand.copy_(value)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_close(result, expected)


def work(dtype: torch.dtype, device: torch.device) -> Work:
    one = case("patch_merge, as timm")
    operands = tuple(x.requires_grad_() for x in one.operands(dtype, device))
    return Work(one.name, operands, backends.use_backend("reference")(one.call), 1, 1.0, "FLOP")


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_benchmark_of_an_op(device: torch.device, mode: str) -> None:
    """Called everywhere, replayed on a GPU: also a backward pass alone, whose forward pass was before."""
    benchmark = Case("merge", work(torch.float32, device), {"ours": case("patch_merge, as timm").call}, 1e-2)
    (row,) = benchmark.time(mode, benchmark.check(mode), 3, replayed=True)
    assert row.milliseconds > 0
    assert (row.replay_milliseconds is None) == (device.type == "cpu")
    assert row.replay_milliseconds is None or 0 < row.replay_milliseconds < 10 * row.milliseconds


@pytest.mark.gpu
def test_what_waits_has_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out with a word, and the others are timed."""
    x = torch.ones(1 << 20, device=CUDA)
    found = timer.compare_replayed({"waits": lambda: x.sum().item(), "adds": lambda: x + x}, CUDA, 3)
    assert set(found) == {"adds"} and found["adds"].median > 0
    assert "waits: no graph, " in capsys.readouterr().out
    assert torch.cuda.get_sync_debug_mode() == 0
