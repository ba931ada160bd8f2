"""Gram matrices from one backward pass per image, what ``ntk_gram`` is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asvit_fast import ntk_gram
from asvit_fast.scoring.ntk import score_features


def grams_one_by_one(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of the weights and of all parameters, [B, B] each; ``model`` is left in evaluation mode, without caches."""
    model.train().eval()
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
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
