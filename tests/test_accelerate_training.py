"""Training with and without ``accelerate``: the same losses and weights, up to what rounding makes of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af

pytestmark = needs_kernels
STEPS, BATCH, SIZE = 100, 24, 32
LUCK = 5.0  # how much further than another rounding a run may end up


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of training and test [n, 1, 32, 32], labels [n]."""
    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    images = [
        F.interpolate(torch.tensor(part).float().unsqueeze(1) / 8 - 1, size=SIZE, mode="bilinear") for part in parts[:2]
    ]
    return images[0], torch.tensor(parts[2]), images[1], torch.tensor(parts[3])


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=SIZE,
        patch_size=4,
        window_size=3,  # maps of 8 x 8 and 4 x 4 tokens: shifted and padded
        in_chans=1,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=10,
        drop_path_rate=0.1,
    )


Run = tuple[Tensor, dict[str, Tensor], float]  # losses [steps], final weights, accuracy on the test images


def train(change: Callable[[nn.Module], object]) -> Run:
    """Train the model that `change` makes of ours."""
    images, labels, test_images, test_labels = digits()
    model = swin()
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    order = torch.Generator().manual_seed(1)
    losses = []
    torch.manual_seed(2)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        accuracy = (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()
    return torch.tensor(losses), weights, accuracy


def distances(one: Run, other: Run) -> tuple[float, float]:
    """Largest difference of the losses, and that of all weights relative to their size."""
    difference = torch.cat([(one[1][name] - other[1][name]).flatten() for name in one[1]])
    size = torch.cat([weights.flatten() for weights in one[1].values()]).norm()
    return float((one[0] - other[0]).abs().max()), float(difference.norm() / size)


def nudge(model: nn.Module) -> None:
    """Weights changed in their last digit: what rounding alone makes of a run."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7)


@functools.cache
def source() -> tuple[Run, float, float]:
    """The run without ``accelerate``, and how far another rounding of it is away: losses, weights."""
    run = train(lambda model: None)
    return run, *distances(run, train(nudge))


def test_training_is_the_same_up_to_rounding():
    run, losses, weights = source()
    assert run[0][-10:].mean() < run[0][:10].mean() - 0.2 and run[2] > 0.2  # it learns
    fast = train(lambda model: af.accelerate(model, strict=True))
    assert max(losses, weights) < 1e-3
    found = distances(run, fast)
    assert found[0] < LUCK * losses and found[1] < LUCK * weights, (found, losses, weights)
    assert abs(fast[2] - run[2]) < 0.01


def test_a_wrong_gradient_of_the_bias_would_show(monkeypatch: pytest.MonkeyPatch):
    """Half of the gradient of the relative position bias, everything else right."""
    run, losses, weights = source()

    def wrong(model: nn.Module) -> None:
        af.accelerate(model, strict=True)
        module = sys.modules["asvit_fast.acceleration.timm_swin"]
        right = module.window_attention

        def halved(qkv: Tensor, heads: int, window: tuple, shift: tuple, bias: Tensor, *rest: object) -> Tensor:
            return right(qkv, heads, window, shift, (bias + bias.detach()) / 2, *rest)

        monkeypatch.setattr(module, "window_attention", halved)

    found = distances(run, train(wrong))
    assert found[0] > 2 * LUCK * losses and found[1] > 2 * LUCK * weights, (found, losses, weights)
