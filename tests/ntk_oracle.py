"""Gram matrices from one backward pass per image, what ``ntk_gram`` is compared with, and small modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from asvit_fast import ntk_gram
from asvit_fast.scoring.ntk import score_features


class Of(nn.Module):
    """A module of a function of (module, x), with what the function needs as attributes."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def tokens(x: Tensor, width: int = 8) -> Tensor:
    """[B, 3, 8, 8] -> [B, 24, 8]."""
    return x.reshape(x.shape[0], -1, width)


def linears(**names: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(8, width) for name, width in names.items()}


def grams_one_by_one(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """NTK of the weights and of all parameters, [B, B] each; ``model`` is left in evaluation mode, without caches."""
    model.train().eval()
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in chosen.values():
        if not parameter.is_leaf:  # of a scripted module that was copied
            parameter.retain_grad()
    grams = {which: torch.zeros(len(images), len(images), dtype=torch.float64) for which in ("weights", "all")}
    rows: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for sample in score_features(model)(images):
        model.zero_grad()
        sample.sum().backward(retain_graph=True)  # torch.autograd.grad refuses reentrant checkpoints
        for name, parameter in chosen.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows[name].append(gradient.double().flatten())
    model.zero_grad()
    for name, of_samples in rows.items():
        stacked = torch.stack(of_samples)  # [B, parameter]
        grams["all"] += stacked @ stacked.T
        if "weight" in name:
            grams["weights"] += stacked @ stacked.T
    return grams


def assert_gram_is_right(model: nn.Module, images: Tensor, tolerance: float = 1e-9) -> None:
    for parameters, expected in grams_one_by_one(model, images).items():
        largest = float(expected.abs().max())
        assert largest > 0
        error = float((ntk_gram(model, images, parameters) - expected).abs().max())
        assert error <= tolerance * largest, f"{parameters}: {error / largest}"
