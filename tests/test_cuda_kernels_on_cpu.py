"""The CUDA kernels, compiled for the CPU (tests/cuda_on_cpu): indices, barriers and formulas without a GPU.

The undefined behaviour sanitizer watches; it also knows that a load of a vector must be aligned, as a GPU demands.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import TINY
from stacked import assert_as_exact, far_apart, rows
from torch import Tensor

from asvit_fast.ops.gelu_taylor import gelu_taylor_reference
from asvit_fast.ops.layer_norm_taylor import layer_norm_taylor_reference
from asvit_fast.ops.softmax_taylor import softmax_taylor_reference
from asvit_fast.ops.square_taylor import square_taylor_reference
from asvit_fast.ops.tanh_taylor import tanh_taylor_reference
from asvit_fast.ops.window_attention_taylor import window_attention_taylor_reference

COMPILER = shlex.split(os.environ.get("CXX", "c++"))
SANITIZERS = os.environ.get("ASVIT_FAST_SANITIZE") or "undefined"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
TYPES = {dtype: i for i, dtype in enumerate((torch.float32, torch.float64, torch.float16, torch.bfloat16))}
GUARD = 64  # values around a tensor: no kernel may write there, and what it reads there is NaN

every_type = pytest.mark.parametrize("dtype", list(TYPES))
every_order = pytest.mark.parametrize("orders", [0, 1, 2])


def build(root: Path, folder: Path) -> Path:
    """A shared library of csrc/cuda for the CPU; built once for all processes of the test run."""
    shim, library = root / "tests" / "cuda_on_cpu", folder / "cuda_on_cpu.so"
    with open(folder / "cuda_on_cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        sources = [*sorted(root.glob("csrc/cuda/*_taylor.cu")), shim / "functions.cpp"]
        objects = [folder / f"{source.name}.o" for source in sources]

        def run(*arguments: str | Path) -> None:
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            result = subprocess.run([*COMPILER, *arguments], capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stderr

        with ThreadPoolExecutor(2) as pool:
            includes = ["-I", shim, "-I", root / "csrc"]
            list(pool.map(lambda s, o: run(*FLAGS, *includes, "-c", s, "-o", o), sources, objects))
        run("-shared", f"-fsanitize={SANITIZERS}", *objects, "-o", library)
    return library


@pytest.fixture(scope="session")
def kernels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler: {COMPILER[0]!r} is not on PATH")
    folder = tmp_path_factory.getbasetemp()
    return ctypes.CDLL(str(build(root, folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def guarded(x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """A contiguous copy of x between two guards, `offset` values off a vector's alignment; and all of that memory."""
    memory = torch.full((x.numel() + 2 * GUARD + offset,), float("nan"), dtype=x.dtype)
    copy = memory[GUARD + offset :][: x.numel()].view(x.shape)
    return copy.copy_(x), memory


def run(kernels: ctypes.CDLL, name: str, x: Tensor, *arguments: Any, offset: int = 0) -> Tensor:
    """The kernel `name`(input, output, *arguments) from one guarded tensor to another."""
    source, _ = guarded(x, offset)
    return into_guarded(kernels, x, lambda y: getattr(kernels, name)(pointer(source), pointer(y), *arguments), offset)


def into_guarded(
    kernels: ctypes.CDLL, like: Tensor, function: Callable[[Tensor], None], offset: int = 0, finite: bool = True
) -> Tensor:
    """Everything `function` writes into a guarded tensor, all of it and nothing else.

    The threads of a block take turns in order, then in reverse: without a barrier that they need, the results differ.
    """
    results = []
    for backwards in (False, True) if like.dtype == torch.float32 else (False,):
        y, memory = guarded(torch.full_like(like, float("nan"), memory_format=torch.contiguous_format), offset)
        kernels.take_turns_backwards(backwards)
        function(y)
        assert y.isfinite().all() or not finite
        assert memory.isnan().sum() - y.isnan().sum() == memory.numel() - y.numel()
        results.append(y)
    assert torch.equal(results[0], results[-1]) or not finite
    return results[0]


def check(ours: Tensor, reference: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> None:
    exact = [None if parameter is None else parameter.double() for parameter in parameters]
    assert_as_exact(ours, reference(x, *parameters), reference(x.double(), *exact), TINY[x.dtype])


def extent(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """Rows and values per row of x [orders + 1, ..., size]."""
    return ctypes.c_int64(x[0].numel() // x.shape[-1]), ctypes.c_int64(x.shape[-1])


# rows shorter than a vector, of whole vectors, of a warp and more, and of a whole block
SIZES = [1, 3, 8, 33, 64, 257, 1040, 4104]


@every_type
@every_order
def test_layer_norm(kernels, orders, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of the parameters
    for size in SIZES:
        weight, bias = rows(1, size, dtype=dtype, scale=1.0).to(wide).unbind(0)
        for offset, chosen in enumerate(((weight, bias), (weight, None), (None, bias))):
            x = rows(orders, 5, size, dtype=dtype)
            end = pointer(chosen[0]), pointer(chosen[1]), ctypes.c_double(1e-5)
            y = run(kernels, "layer_norm_taylor", x, *extent(x), orders, TYPES[dtype], *end, offset=offset)
            check(y, layer_norm_taylor_reference, x, *(p if p is None else p.to(dtype) for p in chosen))


@every_type
@every_order
def test_softmax(kernels, orders, dtype):
    for size in SIZES:
        for offset in (0, 1):
            x = rows(orders, 5, size, dtype=dtype)
            y = run(kernels, "softmax_taylor", x, *extent(x), orders, TYPES[dtype], offset=offset)
            check(y, softmax_taylor_reference, x)


def gelu_tanh_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return gelu_taylor_reference(x, "tanh", bias)


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return gelu_taylor_reference(x, "none", bias)


@every_type
@every_order
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "tanh", "square"])
def test_unary(kernels, name, orders, dtype):
    function = ["gelu", "gelu_tanh", "tanh", "square"].index(name)
    reference = [gelu_reference, gelu_tanh_reference, tanh_taylor_reference, square_taylor_reference][function]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((1, 1), (3, 7), (2, 1024), (3, 1031)):
        for offset in (0, 1):
            x = rows(orders, *shape, dtype=dtype)
            bias = None if name in ("tanh", "square") or offset else rows(0, shape[-1], dtype=dtype, scale=1.0)[0]
            channels = None if bias is None else bias.to(wide)
            count = ctypes.c_int64(x[0].numel()), orders, TYPES[dtype]
            end = pointer(channels), ctypes.c_int64(shape[-1] if bias is not None else 1), function
            y = run(kernels, "unary_taylor", x, *count, *end, offset=offset)
            check(y, reference, x, *([] if bias is None else [bias]))


# B, H, W, heads, head_dim, window, shift: every layout of the float kernel, windows of one tile and of several
ATTENTIONS = [
    (1, 1, 1, 1, 1, (1, 1), (0, 0)),
    (2, 7, 5, 3, 4, (4, 3), (0, 0)),
    (1, 8, 6, 2, 7, (4, 3), (2, 1)),
    (1, 2, 3, 1, 9, (7, 7), (4, 0)),  # the shift exceeds the map
    (1, 9, 11, 1, 16, (9, 11), (0, 0)),
    (1, 5, 7, 2, 22, (4, 4), (2, 2)),
    (1, 4, 5, 1, 33, (4, 5), (0, 0)),
    (1, 5, 7, 1, 32, (5, 7), (0, 0)),
    (1, 4, 9, 1, 45, (4, 7), (1, 3)),
    (1, 3, 7, 2, 64, (3, 7), (0, 0)),
    (1, 2, 5, 1, 65, (2, 3), (0, 1)),
    (1, 3, 6, 1, 256, (3, 6), (0, 0)),
]


def attention_on_cpu(
    kernels: ctypes.CDLL,
    operands: list[Tensor],
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float,
    finite: bool = True,
) -> Tensor:
    """The kernel on q, k, v [orders + 1, B, H, W, heads, d] of any strides -> [orders + 1, B, H, W, heads*d]."""
    function = getattr(kernels, f"window_attention_taylor_f{8 * operands[0].element_size()}")
    strides = (ctypes.c_int64 * 18)(*(step for operand in operands for step in operand.stride()))
    sizes = (ctypes.c_int64 * 6)(*operands[0].shape)
    windows = (ctypes.c_int64 * 4)(*window, *shift)
    pointers = (ctypes.c_void_p * 3)(*(operand.data_ptr() for operand in operands))

    def write(y: Tensor) -> None:
        function(pointers, strides, sizes, windows, pointer(bias), ctypes.c_double(scale), pointer(y))

    return into_guarded(kernels, operands[0], write, finite=finite).flatten(4)


def test_window_attention_offsets_beyond_32_bits(kernels):
    qkv = rows(1, 1, 3, 4, 3, 2, 3, scale=1.0)  # [2, 1, 3, 4, 3, heads, d]
    view = far_apart(qkv, [2**31 + 11, 1, 2**29 - 3, 2**28 + 5, 2**20, 2**26 + 1, 2**24 + 7])
    ours, theirs = (attention_on_cpu(kernels, list(x.unbind(4)), [2, 2], [1, 0], None, 0.5) for x in (view, qkv))
    assert torch.equal(ours, theirs)


def test_window_attention_masked_by_the_bias(kernels):
    """-inf for the first tiles of keys; a query without any key is NaN, as torch's softmax has it; the lowest number
    masks as well, unless every key has it."""
    q, k, v = rows(2, 1, 1, 150, 3, 1, 4, scale=1.0).unbind(4)
    bias = torch.zeros(1, 150, 150)
    bias[:, :75, :130] = float("-inf")
    ours = attention_on_cpu(kernels, [q, k, v], [1, 150], [0, 0], bias, 0.5)
    truth = window_attention_taylor_reference(q.double(), k.double(), v.double(), [1, 150], [0, 0], bias.double(), 0.5)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)
    bias[:, 40, :140] = bias[:, 41] = torch.finfo(torch.float32).min
    ours = attention_on_cpu(kernels, [q, k, v], [1, 150], [0, 0], bias, 0.5)
    truth = window_attention_taylor_reference(q.double(), k.double(), v.double(), [1, 150], [0, 0], bias.double(), 0.5)
    kept = torch.arange(150) != 41  # in float32, the lowest number and a score is the lowest number; not in float64
    torch.testing.assert_close(ours.double()[:, 0, 0, kept], truth[:, 0, 0, kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[0, 0, 0, 41], v[0, 0, 0, :, 0].mean(0), rtol=1e-5, atol=1e-6)
    bias[:, 3] = float("-inf")
    ours = attention_on_cpu(kernels, [q, k, v], [1, 150], [0, 0], bias, 0.5, finite=False)
    assert torch.equal(ours.isnan().any(-1)[:, 0, 0], (torch.arange(150) == 3).expand(3, -1))


@every_order
@pytest.mark.parametrize("head_dim", [8, 22, 45])
def test_window_attention_large_scores(kernels, orders, head_dim):
    """Scores of 30 and more, where a relative error of TF32 would be one of a percent and more in the weights; values
    and derivatives far from 0, which a row's keys share."""
    q, k, v = rows(orders, 1, 1, 40, 3, 1, head_dim, scale=1.0).unbind(4)
    q = q * 12 * head_dim**-0.5
    v = v + 10.0
    k = k + torch.tensor([0.0, 3.0, 3.0])[: orders + 1].view(-1, 1, 1, 1, 1, 1)
    ours = attention_on_cpu(kernels, [q, k, v], [1, 40], [0, 0], None, 1.0)
    theirs = window_attention_taylor_reference(q, k, v, [1, 40], [0, 0], None, 1.0)
    truth = window_attention_taylor_reference(q.double(), k.double(), v.double(), [1, 40], [0, 0], None, 1.0)
    assert_as_exact(ours, theirs, truth, TINY[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_order
@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_window_attention(kernels, case, orders, dtype):
    batch, height, width, heads, head_dim, window, shift = case
    tokens = window[0] * window[1]
    qkv, _ = guarded(rows(orders, batch, height, width, 3 * heads * head_dim, dtype=dtype, scale=1.0))
    bias, _ = guarded(rows(0, heads, tokens, tokens, dtype=dtype, scale=1.0)[0])
    operands = list(qkv.unflatten(4, (3, heads, head_dim)).unbind(4))  # [orders + 1, B, H, W, heads, d] each
    padded = [torch.nn.functional.pad(x, (1, 2), value=float("nan"))[..., 1:-2] for x in operands]
    for tensors, added in ((operands, bias), (padded, None)):
        ours = attention_on_cpu(kernels, tensors, list(window), list(shift), added, 0.4)
        arguments = list(window), list(shift)
        theirs = window_attention_taylor_reference(*operands, *arguments, added, 0.4)
        wide = [x.double() for x in operands], None if added is None else added.double()
        assert_as_exact(
            ours, theirs, window_attention_taylor_reference(*wide[0], *arguments, wide[1], 0.4), 3 * TINY[dtype]
        )
