"""Blocks x + Attention(norm(x)), then x + Mlp(norm(x)), in inference on a CPU: both sums are made in the product before
them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..ops.linear import linear
from ..ops.packed_linear import library
from .chunked_mlp import ChunkedMlp, is_plain_inference
from .replacement import call_reason
from .syntax import method_digest


def _is_active(path: nn.Module) -> bool:
    """Whether stochastic depth, or what stands for it, does anything, or somebody sees its calls."""
    known = isinstance(path, nn.Identity) or (isinstance(path, (DropPath, StochasticDepth)) and not path.training)
    return not known or call_reason(path) is not None


@functools.cache
def _forward_digest(block: Any) -> str | None:
    return method_digest(block, "forward")


def does(block: Any, known: tuple[str, ...]) -> bool:
    """Whether the forward of a class of blocks is one of those with these digests."""
    return _forward_digest(block) in known


def joins(x: Tensor, paths: Iterable[nn.Module]) -> bool:
    """Whether sums of a map x may be made in products: nothing stands between, and nobody would see it."""
    if not is_plain_inference((), x) or library(x.dtype) is None:
        return False
    return not any(map(_is_active, paths))


def project_onto(layer: Any, x: Tensor, residual: Tensor) -> Tensor:
    """residual + layer(x), of a Linear layer: x [*, K], residual [*, N] -> [*, N]."""
    return linear(x, layer.weight, layer.bias, "none", residual)


def feed_forward_onto(norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
    """x + mlp(norm(x)) of tokens x [..., C]."""
    if isinstance(mlp, ChunkedMlp) and call_reason(mlp) is None:
        return mlp.onto(x, norm)
    return x + mlp(norm(x))
