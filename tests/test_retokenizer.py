"""Re-tokenization in a training loop: what switches, what stays, and that nothing is compiled after the warm-up."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from retokenizer_program import TOPOLOGY
from timm.models import SwinTransformer, VisionTransformer
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import asvit_fast as af
from asvit_fast.training import token_reduction
from asvit_fast.training.retokenizer import RUNS

TESTS = Path(__file__).parent


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return af.create_model(TOPOLOGY, img_size=64, num_classes=5, pos_embed="absolute", **options)


def test_steps() -> None:
    model = network()
    average = ModelEmaV3(model)
    retokenizer = af.Retokenizer(model, "2:4,1:2,2:1", average)
    assert retokenizer.reduction == 1
    changes = []
    for epoch in range(6):
        changes.append(retokenizer.step(epoch))
        wanted = (4, 4, 2, 1, 1, 1)[epoch]
        assert retokenizer.reduction == token_reduction(model) == token_reduction(average) == wanted
    assert changes == [True, False, True, True, False, False]
    assert retokenizer.step(0)  # a resumed training may start anywhere
    af.set_token_reduction(average, 1)
    assert retokenizer.step(0) and token_reduction(average) == 4  # a network of the group that had gone its own way
    with pytest.raises(af.InputError, match="epochs count from 0, got -1"):
        retokenizer.step(-1)


def test_length_of_the_training() -> None:
    assert str(af.Retokenizer(network(), "table6-40", epochs=30).schedule) == "4:4,3:2,23:1"
    with pytest.raises(af.InputError, match="is 300 epochs long but the training has 100"):
        af.Retokenizer(network(), "40:4,30:2,230:1", epochs=100)
    with pytest.raises(af.InputError, match="is in fractions of the training: say for how many epochs"):
        af.Retokenizer(network(), "0.5:4,0.5:1")


def test_networks_that_cannot() -> None:
    """Refused at once, unless the schedule has full tokens only."""
    model = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(af.InputError, match="the tokens of ResNet cannot be reduced"):
        af.Retokenizer(model, "1:4,1:1")
    with pytest.raises(af.InputError, match="the tokens of ResNet cannot be reduced"):
        af.Retokenizer(network(), "1:4,1:1", model)
    retokenizer = af.Retokenizer(model, "1")
    assert not retokenizer.step(3) and retokenizer.reduction == 1
    retokenizer.warmup(torch.randn(2, 3, 64, 64))
    coarse = network()
    coarse.set_token_reduction(4)
    assert af.Retokenizer(coarse, "1").step(0) and token_reduction(coarse) == 1


def test_step_leaves_the_training_alone() -> None:
    """Optimizer, average, GradScaler and learning rate schedule are the same before and after, and go on."""
    model = network()
    average = ModelEmaV3(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu")
    schedule = CosineLRScheduler(optimizer, t_initial=10)
    retokenizer = af.Retokenizer(model, "1:4,1:2,1:1", average)
    parts: tuple[Any, ...] = (model, average, optimizer, scaler, schedule)
    images = torch.randn(4, 3, 64, 64)
    for epoch in range(3):
        before = [copy.deepcopy(part.state_dict()) for part in parts]
        addresses = [parameter.data_ptr() for parameter in model.parameters()]
        retokenizer.step(epoch)
        for part, state in zip(parts, before, strict=True):
            found, wanted = tree_leaves(part.state_dict()), tree_leaves(state)
            for ours, theirs in zip(found, wanted, strict=True):
                assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
        scaler.scale(model(images).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model)
        schedule.step(epoch + 1)
    assert all(state["step"] == 3 for state in optimizer.state.values())


# --------------------------------------------------------------------------- warm-up


class Restless(nn.Module):
    """Draws from every generator, has statistics of a BatchNorm and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.BatchNorm2d(3)
        self.network = network(drop_path_rate=0.5)
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        mode = "train" if self.training else "inference" if torch.is_inference_mode_enabled() else "no_grad"
        self.calls.append((token_reduction(self), len(images), mode, autocast))
        return self.network(self.normalize(images)) * torch.rand(())


def test_warmup_leaves_everything_as_it_was() -> None:
    model = Restless()
    model.network.stages[0].eval()  # a part that the user froze
    model.normalize.bias.grad = torch.ones(3)
    retokenizer = af.Retokenizer(model, "1:4,1:2,1:1")
    retokenizer.step(1)
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    wanted = drawn()
    random.setstate(generators[0])
    np.random.set_state(generators[1])  # noqa: NPY002
    torch.set_rng_state(generators[2])
    retokenizer.warmup(
        lambda reduction: torch.ones(2 * reduction, 3, 64, 64), lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert drawn() == wanted
    assert retokenizer.reduction == 2
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        if name == "normalize.bias":
            assert torch.equal(parameter.grad, torch.ones(3))
        else:
            assert parameter.grad is None
    modes = ("train", "no_grad")
    assert model.calls == [(r, 2 * r, mode, torch.bfloat16) for r in (4, 2, 1) for mode in modes]


def test_warmup_options() -> None:
    model = Restless()
    retokenizer = af.Retokenizer(model, "1:2,1:1")
    images = torch.ones(2, 3, 64, 64)
    retokenizer.warmup(images, evaluate=False)
    assert model.calls == [(r, 2, "train", None) for r in (2, 1)]
    model.calls.clear()
    retokenizer.warmup(images, torch.autocast("cpu", torch.bfloat16), evaluate=torch.inference_mode)
    assert model.calls == [(r, 2, mode, torch.bfloat16) for r in (2, 1) for mode in ("train", "inference")]


def test_warmup_that_fails_leaves_everything_as_it_was() -> None:
    model = Restless()
    retokenizer = af.Retokenizer(model, "1:4,1:1")
    with pytest.raises(af.InputError, match="no images"):
        retokenizer.warmup(lambda _: (_ for _ in ()).throw(af.InputError("no images")))
    assert retokenizer.reduction == 1 and model.training


# --------------------------------------------------------------------------- torch.compile

COMPILED: dict[str, Callable[[], nn.Module]] = {
    "asvit": network,
    "vit": lambda: VisionTransformer(64, 8, embed_dim=16, depth=1, num_heads=2, num_classes=5),
    "swin": lambda: SwinTransformer(64, 2, embed_dim=8, depths=(2,), num_heads=(1,), num_classes=5, window_size=8),
}


@pytest.mark.parametrize("name", [pytest.param("asvit", marks=pytest.mark.slow), "vit", "swin"])
def test_nothing_is_compiled_after_the_warmup(name: str) -> None:
    """Through all phases, in training and evaluation, and back again; a switch takes far below a second."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(COMPILED[name](), backend=backend, dynamic=False)
    images = torch.randn(2, 3, 64, 64)
    retokenizer = af.Retokenizer(model, "1:4,1:2,1:1")
    retokenizer.warmup(images)
    assert len(graphs) == 6  # three reductions, training and evaluation; no graph breaks
    assert len(graphs) < torch._dynamo.config.recompile_limit
    outputs = {}
    for epoch in (0, 1, 2, 1, 0, 2):
        start = time.perf_counter()
        assert retokenizer.step(epoch)
        assert time.perf_counter() - start < 0.2
        model.train()
        model(images).square().sum().backward()
        model.eval()
        with torch.no_grad():
            outputs[retokenizer.reduction] = model(images)
            torch.testing.assert_close(outputs[retokenizer.reduction], model._orig_mod(images))
    assert len(graphs) == 6
    assert not torch.equal(outputs[4], outputs[2]) and not torch.equal(outputs[2], outputs[1])


def test_warmup_records_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(mode="reduce-overhead") records one in the second run of what it has compiled."""
    runs = []
    model = network()
    model.register_forward_hook(lambda *_: runs.append((token_reduction(model), model.training)))
    retokenizer = af.Retokenizer(model, "1:2,1:1")
    monkeypatch.setitem(RUNS, "cpu", RUNS["cuda"])
    retokenizer.warmup(torch.randn(2, 3, 64, 64))
    both = [True, False] * 2
    assert runs == [(reduction, training) for reduction in (2, 1) for training in both]
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


@pytest.mark.slow
def test_nothing_is_compiled_for_the_batches_of_the_phases() -> None:
    """With another batch size for every reduction, mixed precision, and torch.compile's own choice of shapes."""
    torch._dynamo.reset()
    counters.clear()
    model = torch.compile(network(), backend="eager")
    batches = {r: torch.randn(2 * r, 3, 64, 64) for r in (4, 2, 1)}
    retokenizer = af.Retokenizer(model, "1:4,1:2,1:1")
    retokenizer.warmup(batches.__getitem__, torch.autocast("cpu", torch.bfloat16))
    before = counters["stats"]["unique_graphs"]
    assert before == 6 and not counters["graph_break"]
    for epoch in (0, 1, 2, 0):
        retokenizer.step(epoch)
        images = batches[retokenizer.reduction]
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).square().sum()
        loss.backward()
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(images)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = str(TESTS / "retokenizer_program.py")
    done = subprocess.run([*command, program], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for case in ("network ddp", "network fsdp2", "windowed ddp", "windowed fsdp2"):
        assert f"{case} agrees 0" in done.stdout and f"{case} agrees 1" in done.stdout
