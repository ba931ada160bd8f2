"""Windowed softmax attention of a value and of its derivatives along a curve.

With scores s(t) = scale q(t) k(t)^T + bias, weights p = softmax(s) and <.> the mean under p,

    p' = p (s' - <s'>),    p'' = p (s'' - <s''> + (s' - <s'>)^2 - <(s' - <s'>)^2>),    y = p v and Leibniz' rule:

one exponential for all orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..errors import InputError
from .checks import check_floats, check_length, check_scale, check_tensor
from .taylor_op import taylor_op
from .taylor_utils import compute_dtype
from .windows import check_channels, check_windows, merge_windows, padding_tokens, partition_windows, window_mask

# Bytes of one piece of attention map and its derivatives: a core's L2 on a CPU; on a GPU enough to fill it.
PIECE_BYTES = {"cpu": 2**20, "cuda": 2**28}

# --------------------------------------------------------------------------- reference


def attention_taylor_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Derivatives of softmax(scale q k^T + mask) v, the attention map in pieces that stay in the cache.

    q [orders + 1, *batch, queries, d], k [orders + 1, *batch, keys, d], v [orders + 1, *batch, keys, dv], mask
    broadcastable to [*batch, queries, keys] -> [orders + 1, *batch, queries, dv].
    """
    batch, queries, keys = q.shape[1:-2], q.shape[-2], k.shape[-2]
    q, k, v = (x.flatten(1, -3) if x.dim() > 3 else x.unsqueeze(1) for x in (q, k, v))  # [orders + 1, n, tokens, d]
    left, right = _score_factors(q * scale, k)
    row_bytes = 3 * len(q) * keys * q.element_size()
    rows = max(1, PIECE_BYTES.get(q.device.type, 2**24) // max(1, row_bytes))
    per_piece, rows = max(1, rows // max(1, queries)), max(1, min(rows, queries))
    if mask is not None:
        mask = (
            mask.expand(*batch, *mask.shape[-2:]).flatten(0, -3) if batch else mask.unsqueeze(0)
        )  # [n, queries or 1, keys]
    pieces = []
    for n in range(0, max(1, q.shape[1]), per_piece):
        group = slice(n, n + per_piece)
        columns = [factor[group] for factor in right]
        strips = []
        for start in range(0, max(1, queries), rows):
            strip = slice(start, start + rows)
            piece_mask = None
            if mask is not None:
                piece_mask = mask[group] if mask.shape[-2] == 1 else mask[group, strip]
            strips.append(_piece([factor[group, strip] for factor in left], columns, v[:, group], piece_mask))
        pieces.append(strips[0] if len(strips) == 1 else torch.cat(strips, dim=2))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # [orders + 1, n, queries, dv]
    return out.reshape(len(q), *batch, queries, v.shape[-1])


def _score_factors(q: Tensor, k: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Factors whose products are the derivatives of the scores, Leibniz's sums folded into longer rows:
    s' = [q' q] [k k']^T, s'' = [q'' 2q' q] [k k' k'']^T."""
    left, right = [q[0]], [k[0]]
    if len(q) >= 2:
        left.append(torch.cat([q[1], q[0]], -1))
        right.append(torch.cat([k[0], k[1]], -1))
    if len(q) == 3:
        left.append(torch.cat([q[2], 2 * q[1], q[0]], -1))
        right.append(torch.cat([k[0], k[1], k[2]], -1))
    return left, [factor.transpose(-2, -1) for factor in right]


def _piece(left: list[Tensor], right: list[Tensor], v: Tensor, mask: Tensor | None) -> Tensor:
    """One piece: left [n, rows, *], right [n, *, keys], v [orders + 1, n, keys, dv] -> [orders + 1, n, rows, dv]."""
    p = torch.bmm(left[0], right[0])  # [n, rows, keys]
    p = torch.softmax(p if mask is None else p + mask, dim=-1)
    orders = [torch.bmm(p, v[0])]
    if len(left) >= 2:
        s1 = torch.bmm(left[1], right[1])
        s1 = s1 - (p * s1).sum(-1, keepdim=True)  # s' - <s'>
        p1 = p * s1
        orders.append(torch.bmm(p1, v[0]) + torch.bmm(p, v[1]))
    if len(left) == 3:
        s2 = torch.bmm(left[2], right[2]) + s1 * s1
        p2 = p * (s2 - (p * s2).sum(-1, keepdim=True))
        orders.append(torch.bmm(p2, v[0]) + 2 * torch.bmm(p1, v[1]) + torch.bmm(p, v[2]))
    return torch.stack(orders)


def window_attention_taylor_reference(
    q: Tensor, k: Tensor, v: Tensor, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    """The op in plain PyTorch operations: any device, any transform, differentiable any number of times.

    q, k, v [orders + 1, B, H, W, heads, d] -> [orders + 1, B, H, W, heads*d].
    """
    rows, size = q.shape[0], [q.shape[2], q.shape[3]]

    def split(x: Tensor) -> Tensor:
        x = partition_windows(x.flatten(0, 1).flatten(3), window, shift)  # [(orders + 1)*B, windows, tokens, heads*d]
        return x.unflatten(3, q.shape[4:]).transpose(2, 3).unflatten(0, q.shape[:2])

    dtype = compute_dtype(q)
    mask = window_mask(size, window, shift, dtype, q.device)  # [windows, tokens, tokens]
    mask = None if mask is None else mask.unsqueeze(1)
    if bias is not None:
        bias = bias.to(dtype)
        is_padding = padding_tokens(size, window, shift, q.device)  # [windows, tokens]
        if is_padding is not None:  # such queries are dropped: what the bias has for them must not reach gradients
            bias = bias.masked_fill(is_padding.unsqueeze(1).unsqueeze(3), 0.0)  # [windows, heads, tokens, tokens]
        mask = bias if mask is None else mask + bias
    out = attention_taylor_reference(split(q.to(dtype)), split(k.to(dtype)), split(v.to(dtype)), mask, scale)
    out = out.flatten(0, 1).transpose(2, 3).flatten(3)  # [(orders + 1)*B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift).unflatten(0, (rows, -1)).to(q.dtype)


# --------------------------------------------------------------------------- fused op


def _cuda_cannot(arguments: Sequence[Any], config: None) -> str | None:
    extension, head_dim = _extension.extension(), arguments[0].shape[-1]
    if extension is None or head_dim <= extension.maximum_head_dim_cuda:
        return None
    return f"the CUDA kernel goes up to head_dim {extension.maximum_head_dim_cuda}, got {head_dim}"


def _fake(
    q: Tensor, k: Tensor, v: Tensor, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:4], q.shape[4] * q.shape[5])


WINDOW_ATTENTION_TAYLOR = taylor_op(
    "window_attention_taylor", window_attention_taylor_reference, fake=_fake, can_run={"cuda": _cuda_cannot}
)

# --------------------------------------------------------------------------- public


def _check(
    qkv: Tensor, num_heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None
) -> tuple[list[int], list[int], Tensor | None]:
    """InputError for arguments that do not fit; window, shift and bias as `check_windows` returns them."""
    name = "window_attention_taylor"
    check_tensor(name, "qkv", qkv)
    if qkv.dim() != 5 or not 1 <= qkv.shape[0] <= 3:
        raise InputError(
            f"{name}: qkv must be [orders + 1, B, H, W, 3*heads*head_dim] with 0 to 2 orders, "
            f"got shape {tuple(qkv.shape)}"
        )
    check_floats(name, "qkv", qkv)
    check_length(name, "window", window, 2)
    check_length(name, "shift", shift, 2)
    if bias is not None and bias.dtype != qkv.dtype:
        raise InputError(f"{name}: bias must be {qkv.dtype} as qkv is, got {bias.dtype}")
    size = [qkv.shape[2], qkv.shape[3]]
    check_channels(name, qkv.shape[4], num_heads, 3)
    return check_windows(name, size, num_heads, list(window), list(shift), bias, qkv)


def window_attention_taylor(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`window_attention` of a value and of its first derivatives along a curve, in one pass.

    Args:
        qkv: [orders + 1, B, H, W, 3*heads*head_dim], the fused projection's value, then 0, 1 or 2 derivatives with
            respect to t (not divided by factorials); channels ordered q | k | v, each [head, head_dim]; float32,
            float64, float16 or bfloat16 (the latter two computed in float32). Read in place whatever its strides.
        num_heads: attention heads.
        window, shift: as for `window_attention`.
        bias: [heads, tokens, tokens] of qkv's dtype, constant along the curve, added to the scaled scores.
        scale: factor on q @ k; head_dim ** -0.5 by default.

    Returns:
        [orders + 1, B, H, W, heads*head_dim], contiguous, of qkv's dtype. -inf in the bias masks keys; a query
        whose keys are all masked is NaN, as with torch.softmax.

    Raises:
        InputError: shapes or values that do not fit.

    Gradients of every order go through the reference, whose attention maps they keep in memory.

    Examples:
        >>> import torch, asvit_fast as af
        >>> qkv = torch.randn(2, 1, 14, 14, 3 * 4 * 16)  # a value and its velocity
        >>> af.ops.window_attention_taylor(qkv, 4, (7, 7)).shape
        torch.Size([2, 1, 14, 14, 64])
    """
    windows, shifts, bias = _check(qkv, num_heads, window, shift, bias)
    check_scale("window_attention_taylor", scale)
    head_dim = qkv.shape[4] // (3 * num_heads)
    q, k, v = qkv.unflatten(4, (3, num_heads, head_dim)).unbind(4)  # [orders + 1, B, H, W, heads, d]
    factor = head_dim**-0.5 if scale is None else scale
    return stacked_window_attention(q, k, v, windows, shifts, bias, factor)


def stacked_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Tensor:
    """The same on separate operands of any strides: [orders + 1, B, H, W, heads, d] each -> [orders + 1, B, H, W,
    heads*d]."""
    if q.numel() == 0:
        return window_attention_taylor_reference(q, k, v, window, shift, bias, scale)
    return WINDOW_ATTENTION_TAYLOR(q, k, v, window, shift, bias, scale)
