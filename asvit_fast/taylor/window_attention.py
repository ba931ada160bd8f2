"""Rules of our own ops: windowed attention whole, patch embedding and merging through their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..ops.window_attention import merge_windows, partition_windows, split_heads, window_attention, window_mask
from .attention import attention
from .linear import _bind
from .value import Taylor, TaylorError, register_rule


@register_rule(window_attention)
def windowed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    qkv, num_heads, window, shift, bias, scale, dropout = _bind(
        args, kwargs, qkv=None, num_heads=None, window=None, shift=(0, 0), bias=None, scale=None, dropout=0.0
    )
    if dropout > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    c = qkv.coefficients  # [orders, B, H, W, 3*heads*d]
    size, orders = [c.shape[2], c.shape[3]], c.shape[0]
    windows = partition_windows(c.flatten(0, 1), list(window), list(shift))  # [orders*B, windows, tokens, 3*heads*d]
    q, k, v = (
        x.unflatten(0, (orders, -1)) for x in split_heads(windows, num_heads)
    )  # [orders, B, windows, heads, tokens, d]
    mask = window_mask(size, list(window), list(shift), c.dtype, c.device)  # [windows, tokens, tokens]
    mask = None if mask is None else mask.unsqueeze(1)
    if bias is not None:
        mask = bias if mask is None else mask + bias
    out = attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    out = out.flatten(0, 1).transpose(2, 3).flatten(3)  # [orders*B, windows, tokens, heads*d]
    return Taylor(merge_windows(out, size, list(window), list(shift)).unflatten(0, (orders, -1)))


@register_rule(patch_embed)
def embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return patch_embed_reference(*args, **kwargs)


@register_rule(patch_merge)
def merging(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return patch_merge_reference(*args, **kwargs)
