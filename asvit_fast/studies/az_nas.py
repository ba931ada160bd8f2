"""The parts of AZ-NAS that look at a network's blocks: expressivity, progressivity, trainability.

Source: J. Lee and B. Ham, AZ-NAS: assembling zero-cost proxies for network architecture search (arXiv 2403.19232). The
fourth part, complexity, is the number of multiply-adds.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..models import AsViT
from ..models.asvit import Block

TINY = 1e-6  # of the authors, against division by zero


def az_nas_measures(model: AsViT, images: Tensor, generator: torch.Generator) -> dict[str, float]:
    """``az_expressivity``, ``az_progressivity``, ``az_trainability`` of a network; larger is better for all.

    ``images`` [B, 3, H, W] run through the network once, with norms. The entropy of a block is that of the normalised
    eigenvalues of the covariance of its output tokens: how many directions they fill. Expressivity is the sum of the
    entropies, progressivity the smallest growth from a block to the next. Trainability is the mean over blocks of
    2 - s - 1/s, at most 0, where s estimates the largest singular value of the block's Jacobian from one backward pass
    with random signs of ``generator``.
    """
    passes: list[tuple[Tensor, Tensor]] = []  # input and output of each block, [B, h, w, C]

    def remember(block: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        passes.append((inputs[0], output))

    handles = [module.register_forward_hook(remember) for module in model.modules() if isinstance(module, Block)]
    try:
        with torch.enable_grad():
            model.score_features(images)
    finally:
        for handle in handles:
            handle.remove()
    entropies = [_entropy(output.detach().flatten(0, 2)) for _, output in passes]
    growth = [after - before for before, after in itertools.pairwise(entropies)]
    singular = [_largest_singular_value(before, after, generator) for before, after in passes]
    return {
        "az_expressivity": sum(entropies),
        "az_progressivity": min(growth),
        "az_trainability": sum(2 - s - 1 / (s + TINY) for s in singular) / len(singular),
    }


def _entropy(tokens: Tensor) -> float:
    """Entropy, in nats, of the normalised eigenvalues of the covariance of tokens [N, C]."""
    centred = tokens.double() - tokens.double().mean(0)  # [N, C]
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(centred)).clamp(min=0)  # [C]
    shares = eigenvalues / eigenvalues.sum()  # [C]
    return float(torch.special.entr(shares).sum())


def _largest_singular_value(before: Tensor, after: Tensor, generator: torch.Generator) -> float:
    """Of a block's Jacobian between channels, from its input and output [B, h, w, C].

    With random signs g, the mean over tokens of (J^T g) g^T is J^T averaged, as the mean of g g^T is the identity.
    """
    signs = torch.randint(0, 2, after.shape, generator=generator).to(after) * 2 - 1  # [B, h, w, C]
    (gradient,) = torch.autograd.grad(after, before, signs, retain_graph=True)  # [B, h, w, C]
    pairs, outer = gradient.flatten(0, 2), signs.flatten(0, 2)  # [N, C]
    return float(torch.linalg.matrix_norm((pairs.T @ outer / len(outer)).double(), 2))
