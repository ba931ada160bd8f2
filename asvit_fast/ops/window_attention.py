"""Attention inside (shifted) windows of a channels-last feature map, straight from the projections to q, k and v:
softmax(scale q k^T + bias) v of each window and head. window_attention_reference.py has the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension, backends
from ..errors import InputError
from .fused_op import FusedOp, Gradients, Operands, Result, Saved, no_float64
from .window_attention_config import WindowAttentionConfig, fitting_bias, make_config, split_scale
from .window_attention_reference import masked_scores, window_attention_reference
from .windows import (
    fold_key_windows,
    merge_windows,
    token_count,
    window_mask,
    window_projections,
)

Projections = Tensor | tuple[Tensor, Tensor, Tensor]  # the fused map q | k | v, or three maps


# --------------------------------------------------------------------------- fused op


def is_single_tile(tokens: int, head_dim: int, bits: int) -> bool:
    """Whether Triton has all scores of a window in registers: its backward pass needs no statistics then."""
    return tokens <= 64 and head_dim <= 32 and bits == 16


class _Operands(NamedTuple):
    """Tensors of a call: the fused map q | k | v alone, or three maps; then parameters."""

    q: Tensor  # [B, *size, 3*heads*d], or as the next two
    k: Tensor | None  # [B, *size, heads*d]
    v: Tensor | None
    bias: Tensor | None  # [heads, queries, keys]
    padding: Tensor | None  # [3*heads*d]
    attn_scale: Tensor | None  # [heads], as the next
    head_scale: Tensor | None

    @property
    def projections(self) -> list[Tensor]:
        """qkv, or q, k and v."""
        return [self.q] if self.k is None or self.v is None else [self.q, self.k, self.v]

    @property
    def size(self) -> list[int]:
        """Tokens along each axis of the map."""
        return list(self.q.shape[1:-1])

    @property
    def channels(self) -> int:
        """heads * head_dim."""
        return self.q.shape[-1] // (3 if self.k is None else 1)


def _reference(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    x = _Operands(*operands)
    return window_attention_reference(
        x.projections, config.num_heads, config.window, config.shift, x.bias, config.scale, config.dropout,
        config.layout, x.padding, x.attn_scale, config.key_window, x.head_scale,
    )  # fmt: skip


def _window_projections(x: _Operands, config: WindowAttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, windows, heads, tokens, d]."""
    return window_projections(
        x.projections, config.num_heads, config.window, config.shift, config.layout, x.padding,
        config.key_window,
    )  # fmt: skip


def _sdpa(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    """The op through torch's fused attention, which has neither forward mode nor double backward."""
    x, window, shift, layout = _Operands(*operands), config.window, config.shift, config.layout
    q, k, v = _window_projections(x, config)
    batch, windows = q.shape[:2]
    if x.head_scale is not None:
        q = q * x.head_scale.to(q.dtype).unsqueeze(1).unsqueeze(2)
    mask = window_mask(x.size, window, shift, q.dtype, q.device, layout, config.key_window)  # [windows, queries, keys]
    bias = None if x.bias is None else x.bias.to(q.dtype)
    if mask is not None:
        mask = mask.unsqueeze(1)
        mask = mask if bias is None else mask + bias
        mask = mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [B*windows, 1 or heads, queries, keys]
    elif bias is not None:
        mask = bias.unsqueeze(0)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, config.dropout, scale=config.scale
    )  # [B*windows, heads, queries, d]
    out = out.unflatten(0, (batch, windows)).transpose(2, 3).flatten(3)  # [B, windows, queries, heads*d]
    return merge_windows(out, x.size, window, shift, layout)


def _is_single_tile(x: _Operands, config: WindowAttentionConfig) -> bool:
    tokens, head_dim = token_count(config.kv_window), x.channels // config.num_heads
    return is_single_tile(tokens, head_dim, 8 * x.q.element_size())


def _statistics_shape(x: _Operands, config: WindowAttentionConfig) -> list[int]:
    if x.q.device.type == "cuda" and _is_single_tile(x, config):
        return [0]
    return [2, *x.q.shape[:-1], config.num_heads]


def _working_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _statistics(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    """[2, B, *size, heads]: largest score of a row, 1 / sum of its weights; empty where the backward pass does not need
    them."""
    x = _Operands(*operands)
    if _statistics_shape(x, config) == [0]:
        return x.q.new_empty(0, dtype=torch.float32)
    q, k, _ = _window_projections(x, config)
    scores = masked_scores(
        q, k, x.size, config.window, config.shift, x.bias, config.scale, config.layout, config.key_window,
        x.head_scale,
    )[0].to(_working_type(q))  # fmt: skip
    largest = scores.amax(-1)  # [B, windows, heads, queries]
    inverse = 1.0 / torch.exp(scores - largest.unsqueeze(-1)).sum(-1)
    return torch.stack([
        merge_windows(rows.transpose(2, 3), x.size, config.window, config.shift, config.layout)
        for rows in (largest, inverse)
    ])  # fmt: skip


def _fake(operands: Operands, config: WindowAttentionConfig) -> Result:
    x = _Operands(*operands)
    statistics = x.q.new_empty(_statistics_shape(x, config), dtype=_working_type(x.q))
    return x.q.new_empty(*x.q.shape[:-1], x.channels), statistics


def _compiled(operands: Operands, config: WindowAttentionConfig) -> Result:
    """C++: csrc/window_attention.cpp."""
    _extension.extension()
    return torch.ops.asvit_fast_C.window_attention(*operands, *config.kernel_arguments)


def _compiled_backward(
    gradient: Tensor, operands: Operands, config: WindowAttentionConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    """Sums over windows in an order that only shapes decide."""
    _extension.extension()
    grads = torch.ops.asvit_fast_C.window_attention_backward(
        gradient, *result, *operands, *config.kernel_arguments, needs_grad
    )
    return _fold_gradients(grads, _Operands(*operands), config) if config.key_window else grads


def _fold_gradients(grads: Sequence[Tensor], x: _Operands, config: WindowAttentionConfig) -> Gradients:
    """The gradients of k and v from those of overlapping windows, [B*windows, keys, heads*d]."""
    q, *keys, bias, padding, attn_scale, head_scale = grads
    keys = [fold_key_windows(rows.unflatten(0, (x.q.shape[0], -1)), x.size, config.window, config.kv_window)
            for rows in keys]  # fmt: skip
    maps = [torch.cat([q, *keys], -1), None, None] if x.k is None else [q, *keys]
    return [*maps, bias, padding, attn_scale, head_scale]


def _triton(operands: Operands, config: WindowAttentionConfig) -> Result:
    """kernels/window_attention.py."""
    from asvit_fast.kernels.window_attention import window_attention

    x = _Operands(*operands)
    if _is_single_tile(x, config):  # never read, and without elements on a GPU
        allocate, shape = (x.q.new_empty, [0]) if x.q.is_cuda else (x.q.new_zeros, _statistics_shape(x, config))
        return window_attention(*x, *config.kernel_arguments, None), allocate(shape, dtype=torch.float32)
    statistics = x.q.new_empty(_statistics_shape(x, config), dtype=torch.float32)
    return window_attention(*x, *config.kernel_arguments, statistics), statistics


def _triton_backward(
    gradient: Tensor, operands: Operands, config: WindowAttentionConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    """Sums over windows in an order that only shapes decide."""
    from asvit_fast.kernels.window_attention import window_attention_backward

    x = _Operands(*operands)
    output, statistics = result
    saved = None if _is_single_tile(x, config) else statistics
    return window_attention_backward(gradient, output, saved, *x, *config.kernel_arguments, needs_grad)


def _no_dropout(operands: Operands, config: WindowAttentionConfig) -> str | None:
    if config.dropout == 0.0:
        return None
    if _Operands(*operands).attn_scale is None:
        return f"it has no dropout, got {config.dropout}"
    return (
        "AttnScale with attention dropout has no kernel, and the reference holds every attention matrix: train without "
        "one of the two"
    )


def _sdpa_cannot(operands: Operands, config: WindowAttentionConfig) -> str | None:
    x = _Operands(*operands)
    if x.q.device.type == "cpu" and config.dropout == 0.0 and backends.forced_backend() is None:
        return "it has no double backward"
    return None if x.attn_scale is None else "it has no attn_scale"


WINDOW_ATTENTION = FusedOp(
    "window_attention",
    "q, k?, v?, bias?, padding?, attn_scale?, head_scale?",
    WindowAttentionConfig,
    reference=_reference,
    fake=_fake,
    saved=_statistics,
    needs_output=True,
    forward={"triton": _triton, "cpu": _compiled},
    backward={"triton": _triton_backward, "cpu": _compiled_backward},
    composite={"sdpa": _sdpa},
    can_run={
        "triton": lambda operands, config: _no_dropout(operands, config) or no_float64(operands[0]),
        "cpu": _no_dropout,
        "sdpa": _sdpa_cannot,
    },
)

# --------------------------------------------------------------------------- public


def _is_identity(x: _Operands, config: WindowAttentionConfig) -> bool:
    """Whether windows of one token, which attend only to themselves, have no parameter whose gradient is needed, and no
    backend is forced. On the meta device the op is called for its shape and what it counts."""
    plain = config.dropout == 0.0 and config.key_window is None and all(parameter is None for parameter in x[3:])
    return plain and not x.q.is_meta and backends.forced_backend() is None


def window_attention(
    qkv: Projections,
    num_heads: int,
    window: tuple[int, ...],
    shift: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    layout: str = "masked",
    padding: Tensor | None = None,
    attn_scale: Tensor | None = None,
    kv_window: tuple[int, ...] | None = None,
) -> Tensor:
    """Softmax attention inside windows of a map with two or three axes: qkv [B, H, W, 3*heads*head_dim] ->
    [B, H, W, heads*head_dim], or qkv [B, D, H, W, 3*heads*head_dim] -> [B, D, H, W, heads*head_dim].

    Args:
        qkv: the fused projection, channels ordered q | k | v, each [head, head_dim]; or a tuple of three maps q, k and
            v, [B, H, W, heads*head_dim] or [B, D, H, W, heads*head_dim] each, of any strides. Any floating dtype.
        num_heads: attention heads.
        window: (height, width) or (depth, height, width) in tokens. Windows need not divide the map: it is padded at
            the end. In the layout "masked" a window larger than the map is the map.
        shift: of the cyclic shift, a number per axis below ``window``; tokens that only the shift brings together do
            not attend to each other (Swin, arXiv 2103.14030, section 3.2). None: no shift.
        bias: [heads, queries, keys], added to the scaled scores of every window (both are the product of ``window``, or
            keys of ``kv_window``; where a window is larger than the map, those of either). A query all of whose keys
            have the lowest number of the bias' dtype attends them alike; one whose keys have -inf is NaN, as with
            torch.softmax.
        scale: factor on q @ k, a number, or [heads] with a gradient (cosine attention of Swin V2, arXiv 2111.09883,
            equation 2, on q and k of unit length); head_dim ** -0.5 by default.
        dropout: probability of dropping an attention weight (pass 0 in evaluation).
        layout: "masked": padding is masked out. "timm" or "torchvision": padding is attended to, the mask of the
            shift is -100, and the map is rolled before it is padded ("timm") or after ("torchvision"). "grid": the
            tokens of a window are spread evenly over a map that windows divide (MaxViT, arXiv 2204.01697, section 3.2).
        padding: [3*heads*head_dim], a token of padding in the layouts "timm" and "torchvision": the projection of
            zeros, that is its bias. Zeros by default.
        attn_scale: [heads], w of AttnScale (arXiv 2203.05962, equation 6): the attention A becomes (1 + w) A - w U, U
            uniform over the keys that the query may attend.
        kv_window: tokens of the windows that keys and values come from, as many more on either side of ``window``,
            which overlap (HAT, arXiv 2205.04437, section 3.2). Beyond the map is padding. Without a shift.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, naming the value. Parameters may have another
            floating dtype than qkv, whose dtype the output has.

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels: they keep at most two numbers
    per row and copy nothing, unless the tokens of a map are unevenly spaced or its channels no neighbours; but backward
    passes of windows larger than a tile hold rows of q and of gradients window by window, about as much as qkv. Those
    of ``kv_window`` are summed over the windows of a token afterwards. With dropout, in float64 on a GPU, and where
    Triton is missing, torch's fused attention, which has no double backward. With dropout and attn_scale plain PyTorch
    operations, with one warning.

    Examples:
        >>> import torch, asvit_fast as af
        >>> qkv = torch.randn(2, 14, 14, 3 * 4 * 16)  # [B, H, W, 3*heads*head_dim]
        >>> af.ops.window_attention(qkv, 4, (7, 7), shift=(3, 3)).shape
        torch.Size([2, 14, 14, 64])
    """
    projections = list(qkv) if isinstance(qkv, (tuple, list)) else [qkv]
    if has_torch_function(projections):
        options = (bias, scale, dropout, layout, padding, attn_scale, kv_window)
        return handle_torch_function(window_attention, projections, qkv, num_heads, window, shift, *options)
    op = "window_attention"
    if len(projections) not in (1, 3):
        raise InputError(f"{op}: qkv must be a tensor or the three tensors q, k and v, got {len(projections)}")
    q, k, v = projections if projections[1:] else (projections[0], None, None)
    factor, head_scale = split_scale(scale)
    config = make_config(
        q, k, v, num_heads, window, shift, bias, factor, head_scale, dropout, layout, padding, attn_scale, kv_window
    )
    if bias is not None:
        bias = fitting_bias(bias, q, window, shift, config)
    x = _Operands(q, k, v, bias, padding, attn_scale, head_scale)
    if max(config.window) == 1 and _is_identity(x, config):
        return (q.chunk(3, -1)[2] if v is None else v).contiguous()
    return WINDOW_ATTENTION(x, config)
