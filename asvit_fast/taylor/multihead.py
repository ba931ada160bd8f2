"""Rule of torch.nn.MultiheadAttention, taken apart into its projections and the attention rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .value import NotCovered, TaylorError, register_rule

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@register_rule("multi_head_attention_forward")
def multi_head_attention(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """query [L, B, E] (or [L, E]), key and value [S, B, E] -> output [L, B, E] and weights [B, L, S] or None."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    for name in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v"):
        if a[name] is not None and a[name] is not False:
            raise NotCovered
    if a["training"] and a["dropout_p"] > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    batched = a["query"].dim() == 3
    q, k, v = (x if batched else x.unsqueeze(1) for x in (a["query"], a["key"], a["value"]))
    if a["use_separate_proj_weight"]:
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3))
    biases = [None] * 3 if a["in_proj_bias"] is None else list(a["in_proj_bias"].chunk(3))
    heads = a["num_heads"]
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # [B, heads, tokens, d]
        for x, weight, bias in zip((q, k, v), weights, biases, strict=True)
    )
    mask = _mask(a["attn_mask"], a["key_padding_mask"], q.shape[0], heads, q.dtype)
    probabilities = None
    if a["need_weights"]:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        probabilities = (scores if mask is None else scores + mask).softmax(-1)  # [B, heads, L, S]
        out = probabilities @ v
        probabilities = probabilities.mean(1) if a["average_attn_weights"] else probabilities
    else:
        causal = a["is_causal"] and mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), a["out_proj_weight"], a["out_proj_bias"])  # [L, B, E]
    if not batched:
        out, probabilities = out.squeeze(1), None if probabilities is None else probabilities.squeeze(0)
    return out, probabilities


def _mask(attention: Any, padding: Any, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks of the module as one additive mask, broadcastable to [B, heads, L, S]."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:  # here, unlike in scaled_dot_product_attention, True keeps a key out
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))

    parts = []
    if attention is not None:
        whole = additive(attention)
        parts.append(whole.unflatten(0, (batch, heads)) if whole.dim() == 3 else whole)
    if padding is not None:
        parts.append(additive(padding).reshape(batch, 1, 1, -1))
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
