"""Rules of our own ops: windowed attention whole, patch embedding and merging through their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..ops.window_attention import window_attention, window_attention_reference
from ..ops.window_attention_taylor import window_attention_taylor
from ..ops.windows import fit_windows
from .linear import _bind
from .products import plus_bias
from .value import LinearCombination, Taylor, TaylorError, register_rule, taylors


@register_rule(window_attention)
def windowed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    qkv, num_heads, window, shift, bias, scale, dropout, layout, padding, attn_scale, kv_window = _bind(
        args,
        kwargs,
        qkv=None,
        num_heads=None,
        window=None,
        shift=None,
        bias=None,
        scale=None,
        dropout=0.0,
        layout="masked",
        padding=None,
        attn_scale=None,
        kv_window=None,
    )
    if dropout > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    shift = [0] * len(window) if shift is None else list(shift)
    is_plain = (
        layout == "masked" and attn_scale is None and kv_window is None and not isinstance(scale, (Tensor, Taylor))
    )
    if not is_plain or isinstance(qkv, (tuple, list)) or len(window) == 3:
        return _by_reference(qkv, num_heads, list(window), shift, bias, scale, layout, padding, attn_scale, kv_window)
    if not isinstance(qkv, Taylor) or isinstance(bias, Taylor):
        raise TaylorError("window_attention propagates along qkv, its bias must not move")
    return Taylor(window_attention_taylor(qkv.coefficients, num_heads, window, (shift[0], shift[1]), bias, scale))


def _by_reference(
    qkv: Any, num_heads: int, window: list[int], shift: list[int], bias: Any, scale: Any, layout: str, padding: Any,
    attn_scale: Any, kv_window: Any,
) -> Any:  # fmt: skip
    projections = list(qkv) if isinstance(qkv, (tuple, list)) else [qkv]
    if layout == "masked" and kv_window is None:
        window, shift, bias = fit_windows(list(projections[0].shape[1:-1]), window, shift, bias)
    per_head = isinstance(scale, (Tensor, Taylor))
    factor, head_scale = 1.0 if per_head else scale, scale if per_head else None
    keys = None if kv_window is None else list(kv_window)
    return window_attention_reference(
        projections, num_heads, window, shift, bias, factor, 0.0, layout, padding, attn_scale, keys, head_scale
    )


@register_rule(patch_embed)
def embedding(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps = _bind(
        args,
        kwargs,
        image=None,
        weight=None,
        bias=None,
        stride=None,
        dilation=None,
        padding=None,
        norm_weight=None,
        norm_bias=None,
        eps=1e-5,
    )
    if not isinstance(image, LinearCombination) or image.basis is None or taylors(weight, bias, norm_weight, norm_bias):
        return patch_embed_reference(*args, **kwargs)
    tokens: Any = image.after(patch_embed_reference(image.basis, weight, None, stride, dilation, padding))
    tokens = Taylor(tokens) if bias is None else plus_bias(tokens, bias)  # [order + 1, n, Ho, Wo, C]
    return tokens if norm_weight is None else F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)


@register_rule(patch_merge)
def merging(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return patch_merge_reference(*args, **kwargs)
