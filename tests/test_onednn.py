"""What products of ours ask of oneDNN: never its implementation for reference, which takes a hundred times as long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stacked import needs_extension

MERGING = """
import torch
from asvit_fast import ops
torch.set_num_threads(1)
for side, channels, outputs, kernel in ((8, 180, 86, 4), (8, 64, 128, 2), (16, 24, 96, 3), (28, 96, 192, 2)):
    features = channels * kernel * kernel
    x, weight = torch.randn(2, side, side, channels), torch.randn(outputs, features)
    tensors = [x, weight, torch.ones(features), torch.zeros(features), torch.zeros(outputs)]
    y = ops.patch_merge(tensors[0].requires_grad_(), tensors[1].requires_grad_(), kernel, 2, *tensors[2:])
    y.sum().backward()
"""
LINEAR = """
import importlib
import torch
from asvit_fast.ops import packed_linear
module = importlib.import_module("asvit_fast.ops.linear")
for place in (packed_linear, module):
    place.library = lambda dtype: packed_linear.ONEDNN if dtype == torch.float32 else None
module.SMALL = 0
module.mkl_is_narrow = lambda: True
x = torch.randn(90, 72, requires_grad=True)
weights = [torch.randn(40, 72), torch.randn(72, 40).t(), torch.randn(40, 80)[:, :72], torch.randn(72, 48)[:, :40].t()]
for weight in weights:
    for rows in (x, x[:, :72], torch.randn(72, 90).t(), torch.randn(90, 80)[:, :72]):
        y = module.linear(rows, weight.requires_grad_())
        torch.autograd.grad(y.square().sum(), weight)
        with torch.no_grad():
            module.linear(rows, weight)
            module.linear(rows, torch.nn.Parameter(weight))
"""


@needs_extension
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("program", [MERGING, LINEAR], ids=["patch_merge", "linear"])
def test_no_reference_implementation(program: str, tmp_path: Path) -> None:
    """oneDNN's own log of what it runs."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = [line for line in done.stdout.splitlines() if ",primitive,exec," in line]
    assert [line for line in used if "ref" in line.split(",exec,")[1].split(",")[2]] == []
    if not used and program == MERGING:
        pytest.skip("without AVX-512 its products are MKL's")
    assert used
