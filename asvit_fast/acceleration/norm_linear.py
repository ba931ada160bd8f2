"""A LayerNorm and the Linear layer after it, in one pass where inference on a CPU allows it."""

from __future__ import annotations

from typing import Any

import timm.layers
from torch import Tensor, nn

from ..ops.linear import linear, norm_linear
from ..ops.packed_linear import Norm
from .replacement import call_reason, is_original


def parts_of_norm(layer: Any) -> Norm | None:
    """What a LayerNorm over the channels of single tokens computes with, if it is one and nobody sees its calls."""
    kind = type(layer)
    if kind not in (nn.LayerNorm, timm.layers.LayerNorm) or getattr(layer, "_fast_norm", False):
        return None
    if not is_original(kind, "forward") or call_reason(layer) is not None:
        return None
    if layer.weight is None or layer.bias is None or tuple(layer.normalized_shape) != tuple(layer.weight.shape):
        return None
    return (layer.weight, layer.bias, layer.eps) if layer.weight.dim() == 1 else None


def linear_of_norm(norm: nn.Module, x: Tensor, layer: Any, activation: str = "none") -> Tensor:
    """activation(layer(norm(x))), of a Linear layer: x [*, K] -> [*, N], in one kernel where there is one."""
    parts = parts_of_norm(norm)
    y = None if parts is None else norm_linear(x, parts, layer.weight, layer.bias, activation)
    return linear(norm(x), layer.weight, layer.bias, activation) if y is None else y
