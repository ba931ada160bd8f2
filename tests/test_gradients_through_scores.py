"""Scores as functions of the weights: reverse mode over a Taylor pass, on the fused ops and on their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.scoring import circle, theta_grid

TOPOLOGY = "8,2,3,2|4,1,2,1|4,2,2,1|2,1,1,1|8,8"  # split and whole windows, one and two layers a stage


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest):
    """Both implementations; both differentiate through the reference."""
    why = backends.available("window_attention_taylor", request.param, "cpu")
    if why is not None:
        pytest.skip(why)
    with backends.use_backend(request.param):
        yield request.param


def model_of(norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = af.create_model(af.Topology.parse(TOPOLOGY), img_size=32, num_classes=4, pos_embed="none", norm=norm)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 50 if "qkv.weight" in name else 10 if weight.dim() > 1 else 1  # attention far from uniform
    return model.double()


def check_gradient(model: nn.Module, functional) -> None:
    """Along random directions of the weights, against central differences: all together, then those of attention."""
    named = {name: weight for name, weight in model.named_parameters() if not name.startswith("head.")}
    check_along(list(named.values()), functional)
    check_along([weight for name, weight in named.items() if "qkv.weight" in name], functional)


def check_along(weights: list[nn.Parameter], functional) -> None:
    gradients = torch.autograd.grad(functional(), weights, allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) >= 0.9 * len(weights)
    directions = [torch.randn_like(weight) for weight in weights]
    predicted = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)

    def moved(step: float) -> float:
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
            value = functional().item()
            for weight, direction in zip(weights, directions, strict=True):
                weight -= step * direction
        return value

    step = 1e-8  # the scores of networks without norms bend sharply
    measured = (moved(step) - moved(-step)) / (2 * step)
    assert predicted.item() == pytest.approx(measured, rel=1e-5)


@pytest.mark.parametrize("norm", ["identity", "layer"])
def test_length(backend, norm):
    """The length of the curve's velocity, as length distortion has it."""
    model = model_of(norm)
    x, dx = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)

    def length() -> Tensor:
        return af.jvp(model.score_features, x, dx)[1].norm(dim=1).sum()

    check_gradient(model, length)


@pytest.mark.parametrize("norm", ["identity", "layer"])
def test_curvature(backend, norm):
    """The extrinsic curvature |a x v| / |v|^3 of the curve of a circle."""
    model = model_of(norm)
    u0, u1 = circle((3, 32, 32), torch.Generator().manual_seed(0))

    def curvature() -> Tensor:
        curve = af.curve(model.score_features, theta_grid(3), u0, u1, scale=50.0)
        v, a = curve.velocity, curve.acceleration  # [n, F]
        product = (v.square().sum(1) * a.square().sum(1) - (v * a).sum(1) ** 2).clamp(min=0).sqrt()
        return (product / v.norm(dim=1) ** 3).sum()

    check_gradient(model, curvature)
