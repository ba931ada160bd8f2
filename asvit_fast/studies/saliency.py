"""Synaptic flow and DSS: two training-free measures made of one backward pass without any data.

Sources: H. Tanaka et al., Pruning neural networks without any data (arXiv 2006.05467); Q. Zhou et al., Training-free
transformer architecture search (arXiv 2203.12217).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..models import AsViT
from ..models.asvit import Block
from ..scoring.score import without_norms


def saliency_measures(model: AsViT, shape: Sequence[int]) -> dict[str, float]:
    """``synflow`` and ``dss`` of a network, for images of ``shape`` [3, H, W].

    Every weight is replaced by its absolute value, norms are left out, the image is all ones, and what is
    differentiated is the sum of the features R. ``synflow`` is the sum of weight x gradient over all weights. ``dss``
    adds, for the linear maps of attention, (nuclear norm of the weight) x (nuclear norm of its gradient), which is
    large where attention keeps a high rank ("synaptic diversity"), and for those of the MLPs weight x gradient
    ("synaptic saliency"). Both are logarithms, which changes no order: the values span many powers of ten.
    """
    positive = without_norms(model).double().cpu()  # a copy
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    for parameter in positive.parameters():
        parameter.grad = None
    with use_backend("reference"), torch.enable_grad():
        features = positive.score_features(torch.ones(1, *shape, dtype=torch.float64))  # [1, F]
        features.sum().backward()
    flow = sum(float(_saliency(parameter)) for parameter in positive.parameters() if parameter.grad is not None)
    blocks = [module for module in positive.modules() if isinstance(module, Block)]
    diversity = sum(_diversity(layer) for block in blocks for layer in (block.attn.qkv, block.attn.proj))
    saliency = sum(float(_saliency(layer.weight)) for block in blocks for layer in (block.mlp.fc1, block.mlp.fc2))
    return {"synflow": _log(flow), "dss": _log(diversity + saliency)}


def _saliency(parameter: Tensor) -> Tensor:
    """Sum of weight x gradient: []."""
    assert parameter.grad is not None
    return (parameter.detach() * parameter.grad).sum()


def _diversity(layer: nn.Linear) -> float:
    """Nuclear norm of the weight [out, in] times that of its gradient."""
    assert layer.weight.grad is not None
    norms = [torch.linalg.matrix_norm(matrix, "nuc") for matrix in (layer.weight.detach(), layer.weight.grad)]
    return float(norms[0] * norms[1])


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else math.nan
