"""What the descendants of Microsoft's Swin Transformer have in common, whose code people copy: attention with one
Linear layer for queries, keys and values, a table of position biases and the index of every pair in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.linear import linear
from ..ops.position_bias import position_bias
from ..ops.window_attention import window_attention
from .computing import cosine_projections, cosine_scale, drop_probability, drops, padding_token, project, window_dropout
from .replacement import DROP, LINEAR, SOFTMAX, Names, Parts, bypass_reason
from .shifts import window_reason
from .structure import Structural

LAYOUT = "torchvision"  # maps are padded, then rolled
# what the forward of an attention does: with and without a branch of its own for softmax without a mask
ATTENTION: Names = ("815663ddc0d7614c", "dd961b3980013760")
COSINE_ATTENTION: Names = ("6caeb9ddfe2a875e", "82779b89a15bd747")
INDEXED_ATTENTION: Names = ("1282201014f1225a",)  # which gets the index of pairs with every call


def attention_parts(name: str = "attn") -> Parts:
    """The layers of an attention of that name."""
    linear, dropout = ("qkv", "proj"), ("attn_drop", "proj_drop")
    parts = {f"{name}.{layer}": LINEAR for layer in linear} | {f"{name}.{layer}": DROP for layer in dropout}
    return {**parts, f"{name}.softmax": SOFTMAX}


def attention_reads(name: str = "attn") -> Names:
    """The attributes of an attention with a table of biases."""
    attributes = ("num_heads", "scale", "window_size", "relative_position_bias_table")
    return tuple(f"{name}.{attribute}" for attribute in attributes)


def cosine_reads(name: str = "attn") -> Names:
    """The attributes of an attention of Swin V2."""
    attributes = ("logit_scale", "cpb_mlp", "relative_coords_table", "relative_position_index", "q_bias", "v_bias")
    return tuple(f"{name}.{attribute}" for attribute in ("num_heads", "window_size", *attributes))


def attention_drops(attn: Any) -> bool:
    """Whether attention dropout is on, which only the source has; warns once."""
    return drops(attn.attn_drop.p, attn.attn_drop.training)


def attention_reason(attn: Any, window: Sequence[int]) -> str | None:
    """Why an attention is not one of these windows, by its shapes."""
    if tuple(attn.window_size) != tuple(window):
        return f"its windows are {tuple(window)}, those of its attention {tuple(attn.window_size)}"
    inner = attn.qkv.out_features
    if inner % (3 * attn.num_heads) != 0 or attn.proj.in_features * 3 != inner:
        return f"its qkv makes {inner} channels for {attn.num_heads} heads"
    tokens = math.prod(window)
    index = getattr(attn, "relative_position_index", None)
    if index is not None and tuple(index.shape) != (tokens, tokens):
        return f"its relative_position_index is {list(index.shape)} for windows of {tokens} tokens"
    table = getattr(attn, "relative_position_bias_table", None)
    if table is not None and (table.dim() != 2 or table.shape[1] != attn.num_heads):
        return f"its relative_position_bias_table is {list(table.shape)} for {attn.num_heads} heads"
    return None


def _output(attn: Any, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    return window_dropout(project(attn.proj, x), drop_probability(attn.proj_drop), window, shift, LAYOUT)


# Below, x is first a map, then its projections, then what attention makes of them: each is freed when the next is
# there, as large images need it.


def attend(attn: Any, x: Tensor, window: Sequence[int], shift: Sequence[int], index: Tensor | None = None) -> Tensor:
    """A map [B, *size, C] -> the same; windows that were clipped to the map have the first rows of the index."""
    tokens, window, shift = math.prod(window), tuple(window), tuple(shift)
    if index is None:
        index = attn.relative_position_index[:tokens, :tokens]
    bias = position_bias(attn.relative_position_bias_table, index.reshape(tokens, tokens))
    padding = padding_token(attn.qkv.bias, x, window)
    x = project(attn.qkv, x)  # [B, *size, 3*C]
    x = window_attention(x, attn.num_heads, window, shift, bias, attn.scale, 0.0, LAYOUT, padding)  # [B, *size, C]
    return _output(attn, x, window, shift)


def attend_by_cosines(attn: Any, x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """A map [B, H, W, C] -> the same by an attention of Swin V2 (arXiv 2111.09883), whose keys have no bias."""
    tokens, window, shift = math.prod(window), tuple(window), tuple(shift)
    bias = None if attn.q_bias is None else torch.cat((attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias))
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))  # [offsets, heads]
    biases = position_bias(table, attn.relative_position_index.reshape(tokens, tokens))
    scale = cosine_scale(attn.logit_scale)
    x = linear(x, attn.qkv.weight, bias)  # [B, H, W, 3*C]
    padding = padding_token(bias, x, window)
    if padding is not None:
        padding = torch.cat(cosine_projections(padding.to(x.dtype), attn.num_heads))
    maps = cosine_projections(x, attn.num_heads)  # [B, H, W, C] each
    x = window_attention(maps, attn.num_heads, window, shift, biases, scale, 0.0, LAYOUT, padding)  # [B, H, W, C]
    del maps
    return _output(attn, x, window, shift)


class SquareBlock(Structural):
    """Base class of blocks with square windows, of one number, for an `attn` whose layers they compute with."""

    ops = ("window_attention",)

    @classmethod
    def windows(cls, module: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """Windows and shift."""
        return (module.window_size,) * 2, (module.shift_size,) * 2

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        window, shift = cls.windows(module)
        why = bypass_reason(module, cls.parts) or window_reason(window, shift)
        return why or attention_reason(module.attn, window)
