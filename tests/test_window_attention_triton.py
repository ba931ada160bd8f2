"""window_attention's Triton kernels: in Triton's interpreter against float64, compiled for GPUs that need not be there,
and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from asvit_fast import ops
from asvit_fast.backends import use_backend

pytest.importorskip("triton")

INTERPRETED = """
import sys
import torch
sys.path.insert(0, "tests")
from test_window_attention_triton import check
check(sys.argv[1], torch.device("cpu"))
print("checked")
"""

# H, W, heads, head_dim, window, shift; a window is one tile in 16 bits up to 64 tokens and head_dim 32
WHOLE = [
    (7, 7, 3, 32, (7, 7), (0, 0)),
    (9, 14, 2, 5, (7, 7), (3, 3)),
    (16, 8, 2, 8, (8, 8), (0, 0)),  # exact tiles: nothing is masked
    (3, 3, 2, 1, (2, 2), (1, 1)),
    (5, 4, 1, 22, (3, 2), (1, 0)),
    (5, 5, 1, 8, (7, 7), (3, 3)),
    (2, 3, 2, 3, (1, 1), (0, 0)),
    (4, 5, 1, 45, (4, 5), (0, 0)),
    (9, 3, 1, 70, (9, 3), (0, 2)),
]
LARGE = [
    (17, 5, 1, 13, (17, 5), (4, 2)),  # a tail of 32
    (10, 13, 1, 45, (10, 10), (0, 0)),
    (8, 16, 1, 8, (8, 16), (0, 0)),  # exact blocks
    (10, 10, 1, 8, (10, 10), (0, 0)),  # a tail as large as a block
    (13, 5, 2, 4, (13, 5), (0, 0)),  # a tail of one token
    (14, 10, 1, 29, (14, 14), (5, 3)),
    (1, 70, 1, 16, (1, 70), (0, 7)),
]
TINY = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def both_ways(qkv, heads, window, shift, bias, gradient) -> list[torch.Tensor]:
    """Output, and gradients of qkv and bias."""
    inputs = [x.detach().requires_grad_() for x in (qkv, bias) if x is not None]
    out = ops.window_attention(inputs[0], heads, window, shift, *inputs[1:])
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def compare(qkv, heads, window, shift, bias) -> None:
    """Forward and all gradients: error(ours) < 2 error(elementary operations, same dtype) + tiny, against float64."""
    shape = (*qkv.shape[:3], qkv.shape[3] // 3)
    gradient = torch.randn(shape, dtype=torch.float64, device=qkv.device).to(qkv.dtype)
    with use_backend("triton"):
        ours = both_ways(qkv, heads, window, shift, bias, gradient)
    with use_backend("reference"):
        table = None if bias is None else bias.to(qkv.dtype)
        theirs = both_ways(qkv, heads, window, shift, table, gradient)
        exact = both_ways(qkv.double(), heads, window, shift, None if bias is None else bias.double(), gradient)
    for name, got, other, want in zip(("output", "qkv", "bias"), ours, theirs, exact, strict=False):
        assert got.shape == want.shape and got.is_contiguous(), name
        assert got.dtype == (bias.dtype if name == "bias" else qkv.dtype), name
        error, allowed = (got - want).abs().max().item(), (other - want).abs().max().item()
        tiny = TINY[got.dtype] * max(1.0, want.abs().max().item())
        assert error < 2 * allowed + tiny, f"{name} of {tuple(qkv.shape)} {qkv.dtype}: {error} against {allowed}"


def check_shapes(cases: list, device: torch.device) -> None:
    """Every dtype, with and without a bias, memory poisoned."""
    for number, (height, width, heads, head_dim, window, shift) in enumerate(cases):
        for dtype in TINY:
            for biased in (False, True):
                if device.type == "cpu" and dtype != torch.float32 and biased == bool(number % 2):
                    continue  # the interpreter is slow
                qkv = torch.randn(1, height, width, 3 * heads * head_dim, device=device).to(dtype)
                tokens = window[0] * window[1]
                bias = torch.randn(heads, tokens, tokens, device=device) if biased else None
                compare(qkv, heads, window, shift, bias)


def check_details(device: torch.device) -> None:
    """What shapes do not show: layouts, empty maps, other bias types, large scores, infinite bias, determinism."""
    qkv = torch.randn(2, 24, 6, 8, device=device).permute(0, 2, 3, 1)  # channels far apart
    compare(qkv, 2, (3, 4), (1, 2), torch.randn(2, 12, 12, device=device).to(torch.bfloat16))
    with use_backend("triton"):
        out = both_ways(qkv, 2, (3, 4), (1, 2), None, torch.ones((), device=device).expand(2, 6, 8, 8))
        assert torch.isfinite(out[1]).all()
        nothing = torch.zeros(0, 6, 8, 24, device=device)
        assert torch.ops.asvit_fast.window_attention(nothing, 2, [3, 4], [0, 0], 1.0, "masked", None, None, None)[
            0
        ].shape == (0, 6, 8, 8)
    for size in (7, 9):
        for dtype, factor in ((torch.float32, 5.0), (torch.bfloat16, 30.0)):
            qkv = torch.randn(1, size, size, 24, device=device)
            qkv[..., :16] *= factor
            compare(qkv.to(dtype), 1, (size, size), (0, 0), None)
    compare(torch.zeros(1, 9, 9, 12, device=device), 1, (9, 9), (3, 3), None)
    for size in (4, 9):  # one tile, and blocks of which some have no key left for a query
        bias = torch.randn(1, size**2, size**2, device=device)
        bias = bias.masked_fill(torch.rand_like(bias) < 0.4, -torch.inf)
        bias[:, :, 0] = 0.0
        bias[:, 2, : size**2 - 1], bias[:, 2, -1] = -torch.inf, 0.0
        qkv = torch.randn(1, size, size, 12, device=device)
        compare(qkv, 1, (size, size), (0, 0), bias)
        bias[0, 3] = -torch.inf
        with use_backend("triton"):
            out = ops.window_attention(qkv, 1, (size, size), (0, 0), bias)
        assert out.isnan().all(-1).flatten().tolist() == [token == 3 for token in range(size**2)]
        arguments = (qkv, 1, (size, size), (1, 0), torch.randn(1, size**2, size**2, device=device), out.nan_to_num())
        with use_backend("triton"):
            assert all(map(torch.equal, both_ways(*arguments), both_ways(*arguments)))


def check_many_windows(device: torch.device) -> None:
    """Several windows per program, the last of them with fewer; more than 65,535 on a GPU."""
    from asvit_fast.kernels import window_attention as kernels

    if device.type == "cpu":
        kernels.PROGRAMS = 3
    compare(torch.randn(3, 10, 8, 24, device=device), 2, (4, 4), (1, 2), torch.randn(2, 16, 16, device=device))
    compare(torch.randn(3, 5, 26, 12, device=device), 2, (5, 13), (2, 0), torch.randn(2, 65, 65, device=device))
    if device.type == "cuda":
        compare(torch.randn(1, 300, 440, 12, device=device), 2, (2, 1), (0, 0), torch.randn(2, 2, 2, device=device))


def check(name: str, device: torch.device) -> None:
    """One of the checks."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    {
        "whole": lambda: check_shapes(WHOLE, device),
        "large": lambda: check_shapes(LARGE, device),
        "details": lambda: check_details(device),
        "many": lambda: check_many_windows(device),
    }[name]()


CHECKS = pytest.mark.parametrize("name", ["whole", "large", "details", "many"])


@CHECKS
def test_interpreted(name, root):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, name],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "checked", result.stderr


@pytest.mark.gpu
@CHECKS
def test_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        check(name, torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


# --------------------------------------------------------------------------- compiled


def arguments_of(name: str, side: int, head_dim: int, dtype: str, capability: int) -> tuple:
    """Signature, constants and options of a kernel with a bias and a mask, for 4 heads and windows of side x side."""
    from asvit_fast.kernels.tiles import block, choose

    tokens = side * side
    options = choose(name, f"{capability}", tokens, head_dim, {"*fp32": 32, "*bf16": 16}[dtype])
    constants = {"HEADS": 4, "HEAD_DIM": head_dim, "BLOCK_D": block(head_dim), "BLOCK": block(tokens)}
    constants |= {"WINDOW_ROWS": side, "WINDOW_COLUMNS": side, "PRECISION": "tf32x3"}
    constants |= {"BIASED": True, "BIAS_GRADIENT": True, "MASKED": True}
    constants |= {key: value for key, value in options.items() if key.isupper()}
    pointers = dict.fromkeys(("bias", "largest", "inverse", "delta", "to_bias"), "*fp32")
    pointers |= dict.fromkeys(("qkv", "output", "gradient", "to_qkv"), dtype)
    signature = {f"{key}_pointer": value for key, value in pointers.items()} | dict.fromkeys(SIZES, "i32")
    options = {key: value for key, value in options.items() if not key.isupper()}
    return signature | {"scale": "fp32"}, constants, options


SIZES = ("windows", "per_program", "height", "width", "shift_rows", "shift_columns")
WHOLE_KERNELS = ("whole", "whole_backward")
LARGE_KERNELS = ("blocked", "q_gradient", "kv_gradient", "bias_gradient")


@pytest.mark.parametrize(
    ("names", "side", "head_dim", "dtype", "capability"),
    [
        (WHOLE_KERNELS, 7, 32, "*bf16", 90),
        (WHOLE_KERNELS, 7, 8, "*bf16", 90),
        (LARGE_KERNELS, 28, 45, "*bf16", 90),
        (LARGE_KERNELS, 14, 32, "*bf16", 90),
        (LARGE_KERNELS, 7, 16, "*fp32", 90),
        (WHOLE_KERNELS, 7, 32, "*bf16", 80),
        (WHOLE_KERNELS, 7, 32, "*bf16", 100),
    ],
)
def test_compiled(names, side, head_dim, dtype, capability):
    """For GPUs that need not be there; on Hopper no register is spilled."""
    from asvit_fast.kernels import window_attention, window_attention_large
    from asvit_fast.kernels.inspection import compile_kernel

    for name in names:
        module = window_attention if name in WHOLE_KERNELS else window_attention_large
        kernel = getattr(module, f"window_attention_{name}_kernel")
        signature, constants, options = arguments_of(name, side, head_dim, dtype, capability)
        report = compile_kernel(
            kernel,
            {key: value for key, value in signature.items() if key in kernel.arg_names},
            {key: value for key, value in constants.items() if key in kernel.arg_names},
            capability,
            **options,
        )
        assert report.shared_bytes <= 99 * 1024, name  # of the smallest GPUs
        if capability == 90:
            assert report.spilled_bytes == 0, f"{name}: {report}"
