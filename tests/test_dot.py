"""kernels/dot.py: how float32 is multiplied, as torch's switches say, and the rounding of operands."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton_versions

pytest.importorskip("triton")

import triton
import triton.language as tl

from asvit_fast.kernels.dot import round_to_tf32

DEFAULT = {"conv": "tf32", "matmul": "tf32x3"}
# what a program sets, in torch's words, and what differs from DEFAULT then; torch 2.11 and 2.14 agree on these
SWITCHES = {
    "pass": {},
    "torch.set_float32_matmul_precision('high')": {"matmul": "tf32"},
    "torch.set_float32_matmul_precision('highest')": {},
    "backends.cuda.matmul.allow_tf32 = True": {"matmul": "tf32"},
    "backends.cudnn.allow_tf32 = False": {"conv": "tf32x3"},
    "backends.cuda.matmul.fp32_precision = 'tf32'": {"matmul": "tf32"},
    "backends.cudnn.conv.fp32_precision = 'ieee'": {"conv": "tf32x3"},
    "backends.fp32_precision = 'tf32'": {"matmul": "tf32"},
    # one after the other, older and newer ones: torch's own older getters raise for some of these
    "backends.cuda.matmul.allow_tf32 = True; backends.cudnn.conv.fp32_precision = 'ieee'": {
        "matmul": "tf32", "conv": "tf32x3",
    },
    "backends.cudnn.allow_tf32 = False; backends.cudnn.conv.fp32_precision = 'tf32'": {},
    "backends.cudnn.allow_tf32 = False; backends.fp32_precision = 'tf32'": {"matmul": "tf32"},
    "torch.set_float32_matmul_precision('high'); backends.cuda.matmul.fp32_precision = 'ieee'": {},
}  # fmt: skip
PROGRAM = """
import json, os, sys, torch
from torch import backends
from asvit_fast.kernels.dot import precision
for line in sys.stdin.read().splitlines():
    if os.fork() == 0:  # a process for each: switches have no way back
        exec(line)
        found = {name: precision(torch.float32, name) for name in ("conv", "matmul")}
        half = {precision(dtype, "conv") for dtype in (torch.float16, torch.bfloat16)}
        print(json.dumps([line, found, precision(torch.float32) == found["matmul"] and half == {"tf32x3"}]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, line
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
@pytest.mark.slow
def test_torchs_switches():
    """All ways to set them, mixed as well: none raises, and what torch's own products do is done."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], input="\n".join(SWITCHES), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line: found for line, found, _ in rows} == {line: DEFAULT | other for line, other in SWITCHES.items()}
    assert all(consistent for *_, consistent in rows)


@triton.jit
def rounded(x_pointer, out_pointer):
    i = tl.arange(0, 16)
    tl.store(out_pointer + i, round_to_tf32(tl.load(x_pointer + i)))


def check_rounding(device: torch.device) -> None:
    """To the nearest, ties away from zero; infinities and NaN stay."""
    step, nan, infinite = 2.0**-10, float("nan"), float("inf")
    pairs = [
        (1.0, 1.0), (-1.0, -1.0), (0.0, 0.0), (1 + step, 1 + step), (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1 + step), (-1 - 0.5 * step, -1 - step), (1 + 0.51 * step, 1 + step), (2 - 0.4 * step, 2.0),
        (3e38, 3e38), (infinite, infinite), (-infinite, -infinite), (nan, nan), (1e-20, 1e-20), (6.5, 6.5),
        (-7.0, -7.0),
    ]  # fmt: skip
    x, want = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    x[12] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that GPUs make
    out = torch.empty_like(x)
    rounded[(1,)](x, out)
    torch.testing.assert_close(out, want, rtol=0.51 * step, atol=0, equal_nan=True)
    exact = [*range(9), 14, 15]
    assert torch.equal(out[exact], want[exact])


def check(name: str, device: torch.device) -> None:
    globals()[f"check_{name}"](device)


@triton_versions.interpreter
@pytest.mark.slow
def test_rounding_interpreted(root):
    triton_versions.run_interpreted(__name__, "rounding", root)


@pytest.mark.gpu
def test_rounding_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    check("rounding", torch.device("cuda"))
