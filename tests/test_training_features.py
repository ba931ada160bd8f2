"""Around the ops in a training loop: mixed precision, checkpointing, deterministic mode, DDP, FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_program import TOPOLOGY
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.backends import use_backend

TESTS = Path(__file__).parent


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return af.create_model(TOPOLOGY, img_size=64, num_classes=5, attn_scale=True)


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(images).square().mean(), list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_torch(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights in float32, activations in what autocast picks: gradients come in float32, no worse than torch's own."""
    images = torch.randn(4, 3, 52, 64)
    exact = gradients(model.double(), images.double())
    model.float()
    with torch.autocast("cpu", dtype=dtype):
        ours = gradients(model, images)
        with use_backend("reference"):
            torchs = gradients(model, images)

    def error(found: list[Tensor]) -> float:
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))

    assert all(gradient.dtype == torch.float32 for gradient in ours)
    assert error(ours) < 2 * error(torchs) + 1e-6


def test_deterministic_mode(model: nn.Module) -> None:
    """Nothing refuses, and two runs agree to the last bit."""
    images = torch.randn(4, 3, 52, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(model, images), gradients(model, images)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attention_does_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    qkv = torch.randn(2, 13, 16, 48).requires_grad_()
    bias = torch.randn(2, 49, 49).requires_grad_()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = af.ops.window_attention(qkv, 2, (7, 7), (3, 3), bias, layout="timm")
            found.append(torch.autograd.grad(out.square().sum(), (qkv, bias)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(kind: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = str(TESTS / "parallel_program.py")
    done = subprocess.run([*command, program, kind], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "agree 0" in done.stdout and "agree 1" in done.stdout
