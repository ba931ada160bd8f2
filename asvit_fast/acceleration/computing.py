"""What replacements compute with the parts of a module, next to the op: projections, padding, dropout, cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops.linear import linear
from ..ops.packed_linear import library
from ..ops.transforms import transform_active
from ..ops.windows import merge_windows, window_padding

DROPOUT = "attention dropout has no kernel"


def project(layer: Any, x: Tensor) -> Tensor:
    """Apply a Linear layer to x [*, K]: [*, N]. Ours is faster on a CPU; elsewhere it is torch's, and so is what it
    says of arguments that do not fit."""
    if x.device.type != "cpu" or library(x.dtype) is None:
        return F.linear(x, layer.weight, layer.bias)
    return linear(x, layer.weight, layer.bias)


def token_major(x: Tensor) -> Tensor:
    """x [..., C] with the channels of every token side by side. Tokens made of a convolution's maps have them a map
    apart, and sums with what attention returns would stay so: every LayerNorm would copy them."""
    return x.contiguous()


def with_token_major_gradient(x: Tensor) -> Tensor:
    """x [..., C], a result, whose gradient gets that order: one that comes from a convolution has the other."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # compilers choose strides themselves
    if x.requires_grad and torch.is_grad_enabled() and not traced and not transform_active():
        x.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())
    return x


def divides(window: Sequence[int], x: Tensor) -> bool:
    """Whether windows divide a map [B, *size, C]."""
    return all(window_padding(n, w) == 0 for n, w in zip(x.shape[1:-1], window, strict=True))


def padding_token(bias: Tensor | None, x: Tensor, window: Sequence[int]) -> Tensor | None:
    """Projection of a token of zeros by a layer with that bias: [channels], or None if it is zeros or windows divide
    the map x [B, *size, C]."""
    return None if divides(window, x) else bias


def drops(probability: float, training: bool) -> bool:
    """Whether attention dropout is on, which only the source has; warns once."""
    if not training or probability == 0.0:
        return False
    _warn_dropout()
    return True


def attention_drops(attn: Any) -> bool:
    """The same of a timm attention: where it fuses it goes by its own mode, elsewhere by that of its `attn_drop`."""
    return drops(attn.attn_drop.p, attn.training or attn.attn_drop.training)


@torch.compiler.assume_constant_result  # a warning would break the graph: this one is given while tracing
def _warn_dropout() -> None:
    backends.notify_once(
        DROPOUT, f"asvit_fast: {DROPOUT}: attention runs as its package does while training; 0.0 makes it fast"
    )


def window_dropout(
    x: Tensor, probability: float, window: Sequence[int], shift: Sequence[int], layout: str = "timm"
) -> Tensor:
    """Dropout of a map x [B, *size, C] with the mask that its windows [B*windows, tokens, C] would draw."""
    if probability == 0.0:
        return x
    size = list(x.shape[1:-1])
    windows = math.prod((n + window_padding(n, w)) // w for n, w in zip(size, window, strict=True))
    ones = x.new_ones(x.shape[0] * windows, math.prod(window), x.shape[-1])
    mask = F.dropout(ones, probability).unflatten(0, (x.shape[0], windows))  # [B, windows, tokens, C]
    return x * merge_windows(mask, size, list(window), list(shift), layout)


def drop_probability(dropout: nn.Dropout) -> float:
    """The probability of a Dropout layer in its present mode."""
    return dropout.p if dropout.training else 0.0


def by_projection(qkv: Tensor, num_heads: int) -> Tensor:
    """Channels ordered [head][q | k | v][d] as the op has them, [q | k | v][head][d]: [..., 3*heads*d] -> the same."""
    return qkv.unflatten(-1, (num_heads, 3, -1)).transpose(-3, -2).flatten(-3)


# --------------------------------------------------------------------------- cosine attention


def unit_heads(x: Tensor, num_heads: int) -> Tensor:
    """Queries or keys [..., heads*d] with heads of unit length, whose products are cosines (Swin V2, arXiv 2111.09883,
    equation 2)."""
    return F.normalize(x.unflatten(-1, (num_heads, -1)), dim=-1).to(x.dtype).flatten(-2)


def cosine_projections(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of unit length and values, [..., heads*d] each, of qkv [..., 3*heads*d]."""
    q, k, v = qkv.chunk(3, -1)
    return unit_heads(q, num_heads), unit_heads(k, num_heads), v


def cosine_scale(logit_scale: Tensor) -> Tensor:
    """Factors on cosines, [heads], of their logarithms, any shape with one number per head."""
    return logit_scale.flatten().clamp(max=math.log(100.0)).exp()
