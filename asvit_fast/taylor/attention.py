"""Rule of softmax attention: one exponential for all orders, the attention map in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .linear import _bind
from .value import Taylor, TaylorError, constant, register_rule

# Bytes of one piece of attention map and its derivatives: a core's L2 on a CPU; on a GPU enough to fill it.
PIECE_BYTES = {"cpu": 2**20, "cuda": 2**28}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Derivatives of softmax(scale q k^T + mask) v.

    q [orders, *batch, queries, d], k [orders, *batch, keys, d], v [orders, *batch, keys, dv], mask broadcastable to
    [*batch, queries, keys] -> [orders, *batch, queries, dv].
    """
    batch, queries, keys = q.shape[1:-2], q.shape[-2], k.shape[-2]
    q, k, v = (x.flatten(1, -3) if x.dim() > 3 else x.unsqueeze(1) for x in (q, k, v))  # [orders, n, tokens, d]
    left, right = _score_factors(q * scale, k)
    row_bytes = 3 * len(q) * keys * q.element_size()
    rows = max(1, PIECE_BYTES.get(q.device.type, 2**24) // row_bytes)
    per_piece, rows = max(1, rows // queries), min(rows, queries)
    if mask is not None:
        mask = (
            mask.expand(*batch, *mask.shape[-2:]).flatten(0, -3) if batch else mask.unsqueeze(0)
        )  # [n, queries or 1, keys]
    pieces = []
    for n in range(0, q.shape[1], per_piece):
        group = slice(n, n + per_piece)
        columns = [factor[group] for factor in right]
        strips = []
        for start in range(0, queries, rows):
            strip = slice(start, start + rows)
            piece_mask = None
            if mask is not None:
                piece_mask = mask[group] if mask.shape[-2] == 1 else mask[group, strip]
            strips.append(_piece([factor[group, strip] for factor in left], columns, v[:, group], piece_mask))
        pieces.append(strips[0] if len(strips) == 1 else torch.cat(strips, dim=2))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # [orders, n, queries, dv]
    return out.reshape(len(q), *batch, queries, v.shape[-1])


def _score_factors(q: Tensor, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Factors whose products are the derivatives of the scores, Leibniz's sums folded into longer rows:
    s' = [q' q] [k k']^T, s'' = [q'' 2q' q] [k k' k'']^T."""
    left, right = [q[0], torch.cat([q[1], q[0]], -1)], [k[0], torch.cat([k[0], k[1]], -1)]
    if len(q) == 3:
        left.append(torch.cat([q[2], 2 * q[1], q[0]], -1))
        right.append(torch.cat([k[0], k[1], k[2]], -1))
    return left, [factor.transpose(-2, -1) for factor in right]


def _piece(left: list[Tensor], right: list[Tensor], v: Tensor, mask: Tensor | None) -> Tensor:
    """One piece: left [n, rows, *], right [n, *, keys], v [orders, n, keys, dv] -> [orders, n, rows, dv]."""
    p = torch.bmm(left[0], right[0])  # [n, rows, keys]
    p = torch.softmax(p if mask is None else p + mask, dim=-1)
    s1 = torch.bmm(left[1], right[1])
    s1 = s1 - (p * s1).sum(-1, keepdim=True)  # s' - <s'>
    p1 = p * s1
    orders = [torch.bmm(p, v[0]), torch.bmm(p1, v[0]) + torch.bmm(p, v[1])]
    if len(left) == 3:
        s2 = torch.bmm(left[2], right[2]) + s1 * s1
        p2 = p * (s2 - (p * s2).sum(-1, keepdim=True))
        orders.append(torch.bmm(p2, v[0]) + 2 * torch.bmm(p1, v[1]) + torch.bmm(p, v[2]))
    return torch.stack(orders)


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
    if dropout > 0.0:
        raise TaylorError("attention with dropout has no derivative to propagate; call model.eval() first")
    like = next(x for x in (q, k, v) if isinstance(x, Taylor))
    q, k, v = (x if isinstance(x, Taylor) else constant(x, like) for x in (q, k, v))
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if isinstance(mask, Taylor):
        raise TaylorError("attention with a moving mask has no Taylor rule; add it to the scores by hand")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return Taylor(attention(q.coefficients, k.coefficients, v.coefficients, mask, factor))
