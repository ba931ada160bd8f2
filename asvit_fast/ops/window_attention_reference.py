"""Windowed attention in plain PyTorch operations, the attention matrix materialised: any device and dtype, double
backward, functorch, forward mode, export. torch.jit.script compiles this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import merge_windows, padding_tokens, window_mask, window_projections


def _high_pass(attention: Tensor, mask: Tensor | None, attn_scale: Tensor) -> Tensor:
    """(1 + w) A - w U of attention [B, windows, heads, queries, keys], U the uniform attention on the same keys."""
    factor = attn_scale.to(attention.dtype).unsqueeze(1).unsqueeze(2)  # [heads, 1, 1]
    if mask is None:
        return (1.0 + factor) * attention - factor / attention.shape[-1]
    allowed = (mask == 0).to(attention.dtype)  # [windows, queries, keys]
    uniform = allowed / allowed.sum(-1, keepdim=True).clamp(min=1.0)
    return (1.0 + factor) * attention - factor * uniform.unsqueeze(1)


def masked_scores(
    q: Tensor,
    k: Tensor,
    size: list[int],
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float | None,
    layout: str,
    kv_window: list[int] | None,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, windows, heads, queries, keys], masked, of q and k [B, windows, heads, tokens, d]; the mask [windows,
    queries, keys]."""
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    q = q * factor
    if head_scale is not None:
        q = q * head_scale.to(q.dtype).unsqueeze(1).unsqueeze(2)
    scores = q @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
        is_padding = padding_tokens(size, window, shift, q.device, layout)  # [windows, queries]
        if is_padding is not None:  # such queries are dropped: what the bias has for them must not reach gradients
            scores = scores.masked_fill(is_padding.unsqueeze(1).unsqueeze(3), 0.0)
    mask = window_mask(size, window, shift, scores.dtype, scores.device, layout, kv_window)
    if mask is not None and layout == "masked":  # filled, not added: what is masked may be NaN
        scores = scores.masked_fill(mask.unsqueeze(1) < 0.0, float("-inf"))
    elif mask is not None:
        scores = scores + mask.unsqueeze(1)
    return scores, mask


def window_attention_reference(
    projections: list[Tensor],
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: str = "masked",
    padding: Tensor | None = None,
    attn_scale: Tensor | None = None,
    kv_window: list[int] | None = None,
    head_scale: Tensor | None = None,
) -> Tensor:
    """``window_attention`` of `projections`, which are qkv, or q, k and v. `head_scale` [heads] is a further factor on
    q @ k."""
    size = list(projections[0].shape[1:-1])
    q, k, v = window_projections(projections, num_heads, window, shift, layout, padding, kv_window)
    scores, mask = masked_scores(q, k, size, window, shift, bias, scale, layout, kv_window, head_scale)
    attention = torch.softmax(scores, dim=-1)
    if mask is not None and layout == "masked":  # again: a row of NaN stays among tokens that attend to each other
        attention = attention.masked_fill(mask.unsqueeze(1) < 0.0, 0.0)
    if attn_scale is not None:
        attention = _high_pass(attention, mask, attn_scale)
    attention = F.dropout(attention, dropout, training=dropout > 0.0).to(v.dtype)
    out = (attention @ v).transpose(2, 3).flatten(3)  # [B, windows, queries, heads*d]
    return merge_windows(out, size, window, shift, layout)
