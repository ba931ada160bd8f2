"""Training on a GPU: a step twice, loss scaling, phases, data on their way, going on after a kill, several GPUs.

With ASVIT_FAST_REHEARSE=1 those that take the fixture ``gpu`` run on the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_models import NETWORKS, as_vit, every_network
from tiny_swin import images
from torch import Tensor, nn
from training_program import CLASSES, PLAIN, SIZE, Pictures, run, run_killed

import asvit_fast as af
from asvit_fast.bench.providers import relative_distance
from asvit_fast.recipe import Recipe
from asvit_fast.training.checkpoint import LAST
from asvit_fast.training.data.loader import DevicePrefetcher, make_loader
from asvit_fast.training.data.reader import Reader

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parent


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


def state_of(result: Any) -> list[Tensor]:
    """Weights and their averages."""
    return [value.cpu() for model in (result.model, result.ema) for value in model.state_dict().values()]


# --------------------------------------------------------------------------- one step


def trained(name: str, gpu: torch.device, dtype: torch.dtype, steps: int = 3) -> tuple[list[float], nn.Module]:
    """Losses and the network after a few steps under autocast, with stochastic depth and loss scaling."""
    torch.manual_seed(0)
    model = NETWORKS[name](gpu).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(gpu.type, enabled=dtype == torch.float16)
    x, targets = images(4).to(gpu), torch.arange(4, device=gpu) % 3
    losses = []
    for _ in range(steps):
        with torch.autocast(gpu.type, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(x), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, model


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_repeat_to_the_bit(name: str, dtype: torch.dtype, gpu: torch.device, repeatable_float32: None) -> None:
    (first, one), (second, other) = (trained(name, gpu, dtype) for _ in range(2))
    assert first == second
    for parameter, again in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, again)


@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_learns_what_float32_does(
    name: str, dtype: torch.dtype, gpu: torch.device, repeatable_float32: None
) -> None:
    (found, _), (expected, _) = trained(name, gpu, dtype, 8), trained(name, gpu, torch.float32, 8)
    assert found == pytest.approx(expected, rel=0.1, abs=0.05)
    assert expected[-1] < expected[0]


@every_network
def test_a_step_that_overflows_is_left_out(name: str, gpu: torch.device) -> None:
    """Gradients of float16 that are not finite change no weight, and halve the scale; the next step counts."""
    model = NETWORKS[name](gpu).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(gpu.type, init_scale=2.0**10, backoff_factor=0.5)
    x, before = images(2).to(gpu), weights(model)
    for factor, changes in ((1e7, False), (1.0, True)):  # 1e7 * 2**10 is more than float16 holds
        with torch.autocast(gpu.type, torch.float16):
            loss = model(x).square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        assert torch.equal(weights(model), before) != changes
        assert weights(model).isfinite().all()
    assert scaler.get_scale() == 2.0**9


# --------------------------------------------------------------------------- whole trainings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_learns_what_a_cpu_learns(dtype: str, gpu: torch.device, repeatable_float32: None) -> None:
    """All phases of token reduction; nothing is drawn at random."""
    mixed = {} if dtype == "float32" else {"amp": True, "amp_dtype": dtype}
    found, expected = run(None, **PLAIN, **mixed, device=str(gpu)), run(None, **PLAIN)
    for ours, theirs in zip(found.epochs, expected.epochs, strict=True):
        assert ours["token_reduction"] == theirs["token_reduction"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2 if dtype == "float32" else 0.1)


def run_killed_repeatably(out: str, update: int, options: dict[str, Any]) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    run_killed(out, update, None, options)


@pytest.mark.parametrize("mixed", [{}, {"amp": True, "amp_dtype": "float16"}], ids=["float32", "float16"])
def test_goes_on_with_the_random_numbers_of_the_gpu(
    mixed: dict[str, Any], gpu: torch.device, tmp_path: Path, repeatable_float32: None
) -> None:
    """Killed in the middle of an epoch and started again: the bits of a training that nobody has disturbed.

    Stochastic depth, Mixup and random erasing draw from the generators of CPU and GPU.
    """
    options = {**mixed, "device": str(gpu), "drop_path": 0.3}
    expected, again = run(None, **options), run(None, **options)
    assert all(map(torch.equal, state_of(again), state_of(expected)))
    process = multiprocessing.get_context("spawn").Process(
        target=run_killed_repeatably, args=(str(tmp_path / "run"), 9, options)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    random = torch.load(tmp_path / "run" / LAST, weights_only=True)["asvit_fast"]["random"][0]
    assert ("cuda" in random) == (gpu.type == "cuda")
    assert all(map(torch.equal, state_of(run(tmp_path / "run", **options)), state_of(expected)))


# --------------------------------------------------------------------------- phases, data


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_retokenizer(compiled: bool, gpu: torch.device, repeatable_float32: None) -> None:
    """Every phase has the CPU's gradients; nothing is compiled after the warm-up."""
    torch.compiler.reset()
    model, reference = as_vit().to(gpu), as_vit()
    backend = "inductor" if gpu.type == "cuda" else "aot_eager"
    network = torch.compile(model, backend=backend, dynamic=False) if compiled else model
    x = images(4)
    retokenizer, other = (af.Retokenizer(one, "1:4,1:2,1:1") for one in (network, reference))
    retokenizer.warmup(x.to(gpu), evaluate=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for epoch in (0, 1, 2, 0):
        for one in (retokenizer, other):
            one.step(epoch)
        found, expected = (
            torch.autograd.grad(one.train()(batch).square().mean(), list(one.parameters()))
            for one, batch in ((network, x.to(gpu)), (reference, x))
        )
        assert relative_distance([gradient.cpu() for gradient in found], [g.double() for g in expected]) < 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


class Photos(Pictures):
    """The pictures as uint8, which are normalised on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.images = self.images.mul(40).add(128).clamp(0, 255).to(torch.uint8)  # [count, 3, SIZE, SIZE]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole(workers: int, gpu: torch.device) -> None:
    """Copied ahead on a stream of their own, while the batch before is slowly used: the CPU's numbers."""

    def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
        reader = Reader(Recipe.of(workers=workers, reprob=0.0, no_aug=True), SIZE, device)
        found = []
        for x, targets in DevicePrefetcher(reader)(make_loader(Photos(), reader, CLASSES, training=True)(0, 0, 48, 4)):
            if device.type == "cuda":
                torch.cuda._sleep(10_000_000)  # clock cycles, so that copies overtake whoever does not wait for them
            found.append((x * 2, targets + 1))
            x.zero_()
            del x, targets  # whose memory the next copies may take
        return [(x.cpu(), targets.cpu()) for x, targets in found]

    found, expected = batches(gpu), batches(torch.device("cpu"))
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[1], theirs[1])


# --------------------------------------------------------------------------- several GPUs


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(kind: str, gpu: torch.device) -> None:
    """NCCL on two GPUs: the gradients of one process."""
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: NCCL takes no two ranks on it")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(TESTS / "parallel_program.py"), kind, gpu.type],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and all(f"agree {rank}" in done.stdout for rank in (0, 1)), done.stderr[-4000:]
