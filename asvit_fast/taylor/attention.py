"""Rule of softmax attention: one exponential for all orders, no attention map in memory where the fused op fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.window_attention_taylor import attention_taylor_reference, stacked_window_attention
from .linear import _bind
from .value import Taylor, TaylorError, constant, laid_out, primals, register_rule


@register_rule("scaled_dot_product_attention")
def scaled_dot_product_attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taylor:
    q, k, v, mask, dropout, causal, scale, grouped = _bind(
        args,
        kwargs,
        query=None,
        key=None,
        value=None,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    )
    if isinstance(scale, Taylor):
        q, scale = q * scale, 1.0
    if dropout > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    like = next(x for x in (q, k, v, mask) if isinstance(x, Taylor))
    q, k, v = (x if isinstance(x, Taylor) else constant(x, like) for x in (q, k, v))
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    if mask is None and q.dim() == 4 and q.shape == k.shape == v.shape:
        return _as_queries(_in_one_window(q.coefficients, k.coefficients, v.coefficients, factor), q)
    if mask is None:
        return _as_queries(attention_taylor_reference(q.coefficients, k.coefficients, v.coefficients, None, factor), q)
    alone = (primals(mask) == float("-inf")).all(-1, keepdim=True)  # [..., queries, 1] no key: torch says 0 there
    mask = mask.masked_fill(alone, 0.0)
    if isinstance(mask, Taylor):  # a bias made of the queries, as in SAM's encoder
        out = torch.softmax(q * factor @ k.transpose(-2, -1) + mask, dim=-1) @ v
    else:
        out = Taylor(attention_taylor_reference(q.coefficients, k.coefficients, v.coefficients, mask, factor))
    return _as_queries(out.masked_fill(alone, 0.0).coefficients, q)


def _as_queries(out: Tensor, q: Taylor) -> Taylor:
    """out [orders + 1, *, heads, tokens, d] in memory as torch's attention has it: as q, with d innermost."""
    like = q.primal
    return Taylor(laid_out(out, like) if like.dim() == 4 and like.stride(-1) == 1 else out.contiguous())


def _in_one_window(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Tokens as a map of one row and one window: q, k, v [orders + 1, B, heads, tokens, d] -> the same shape."""
    heads, tokens, head_dim = q.shape[2:]
    q, k, v = (x.transpose(2, 3).unsqueeze(2) for x in (q, k, v))  # [orders + 1, B, 1, tokens, heads, d]
    out = stacked_window_attention(q, k, v, [1, max(1, tokens)], [0, 0], None, scale)
    return out.squeeze(2).unflatten(3, (heads, head_dim)).transpose(2, 3)
