"""Rules of our own ops: windowed attention whole, patch embedding and merging through their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..ops.window_attention import window_attention, window_attention_reference
from ..ops.window_attention_taylor import window_attention_taylor
from .linear import _bind
from .products import plus_bias
from .value import LinearCombination, Taylor, TaylorError, register_rule, taylors


@register_rule(window_attention)
def windowed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    qkv, num_heads, window, shift, bias, scale, dropout, layout, padding, attn_scale = _bind(
        args,
        kwargs,
        qkv=None,
        num_heads=None,
        window=None,
        shift=(0, 0),
        bias=None,
        scale=None,
        dropout=0.0,
        layout="masked",
        padding=None,
        attn_scale=None,
    )
    if dropout > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    if layout != "masked" or attn_scale is not None:
        return window_attention_reference(
            qkv, num_heads, window, shift, bias, scale, layout=layout, padding=padding, attn_scale=attn_scale
        )
    if not isinstance(qkv, Taylor) or isinstance(bias, Taylor):
        raise TaylorError("window_attention propagates along qkv, its bias must not move")
    return Taylor(window_attention_taylor(qkv.coefficients, num_heads, window, shift, bias, scale))


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
