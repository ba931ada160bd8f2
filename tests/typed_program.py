"""A user's program: type checkers see the public API typed. tests/test_typing.py runs mypy and pyright on it."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration import Report
from asvit_fast.training import TrainingInfo


class Losses(af.Callback):
    """A tracker of one's own."""

    def on_train_begin(self, info: TrainingInfo) -> None:
        self.epochs: int = info.epochs


def design() -> nn.Module:
    topology = af.Topology.parse("8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88")
    assert_type(topology, af.Topology)
    assert_type(topology.heads, int)
    scores = af.score(topology, metrics=("length_distortion",), repeats=1)
    assert_type(scores["length_distortion"].mean, float)
    found = af.search(steps=3, budget=af.Budget(params=(None, 2e6)))
    assert_type(found.topology, af.Topology)
    steps = af.scale(found.topology, max_params=5e6)
    assert_type(steps[-1].topology, af.Topology)
    model = af.create_model(topology, img_size=224)
    assert_type(model, af.AsViT)
    return model


def accelerate(model: nn.Module, images: Tensor) -> Tensor:
    report = af.accelerate(model)
    assert_type(report, Report)
    with af.use_backend("reference"):
        af.verify(model, images)
    af.restore(model)
    return af.ops.window_attention(torch.zeros(1, 14, 14, 3 * 32), 2, (7, 7), shift=(3, 3))


def train(model: nn.Module) -> float | None:
    result = af.train(model, "photos/", schedule="40:4,30:2,230:1", callbacks=[Losses()], batch_size=64)
    assert_type(result, af.TrainResult)
    return result.top1


def derivatives(model: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
    y, v = af.jvp(torch.sin, x, dx)
    assert_type(v, Tensor)
    _, _, a = af.jet(model, x, dx, torch.zeros_like(x))
    assert_type(af.ntk_condition(af.ntk_gram(model, x)), float)
    total: Tensor = y + v + a  # torch says of a module's output that it is anything
    return total
