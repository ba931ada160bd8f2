"""Attention inside (shifted) windows of a channels-last feature map, straight from the fused qkv projection.

The reference is made of plain PyTorch operations: any device and dtype, double backward, functorch, forward mode,
export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _extension, backends
from ..errors import InputError
from .checks import check_floats, check_length, check_operand, check_scale
from .fused_op import FusedOp, Gradients, Operands, Result, Saved, no_float64
from .transforms import sizes
from .windows import (
    check_windows,
    lowest_scores,
    merge_windows,
    padding_tokens,
    partition_windows,
    split_heads,
    window_mask,
    window_padding,
)


def _check(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
    layout: str,
    padding: Tensor | None,
    attn_scale: Tensor | None,
) -> tuple[list[int], list[int], Tensor | None]:
    """InputError for arguments that do not fit; window, shift and bias as ``check_windows`` returns them."""
    op = "window_attention"
    if qkv.dim() != 4:
        raise InputError(f"window_attention: qkv must be [B, H, W, 3*heads*head_dim], got {list(qkv.shape)}")
    check_floats(op, "qkv", qkv)
    if layout not in ("masked", "timm", "torchvision", "grid"):
        raise InputError(f"window_attention: layout must be masked, timm, torchvision or grid, got {layout}")
    check_scale(op, scale)
    if not 0.0 <= dropout <= 1.0:
        raise InputError(f"window_attention: dropout must be from 0 to 1, got {dropout}")
    size = [qkv.shape[1], qkv.shape[2]]
    window, shift, bias = check_windows(op, size, num_heads, qkv.shape[3], window, shift, bias, qkv, layout)
    if bias is not None:
        bias = lowest_scores(bias, qkv)
    if layout == "grid":
        if shift[0] != 0 or shift[1] != 0:
            raise InputError(f"window_attention: the layout grid has no shift, got {shift}")
        if window_padding(size[0], window[0]) != 0 or window_padding(size[1], window[1]) != 0:
            raise InputError(f"window_attention: in the layout grid windows divide the map, got {window} for {size}")
    if padding is not None and (layout == "masked" or layout == "grid"):
        raise InputError(f"window_attention: padding is masked out in the layout {layout}, so it has no values")
    check_operand(op, "padding", padding, [qkv.shape[3]], qkv)
    check_operand(op, "attn_scale", attn_scale, [num_heads], qkv)
    return window, shift, bias


def _high_pass(attention: Tensor, mask: Tensor | None, attn_scale: Tensor) -> Tensor:
    """(1 + w) A - w U of attention [B, windows, heads, tokens, tokens], U the uniform attention on the same keys."""
    factor = attn_scale.to(attention.dtype).unsqueeze(1).unsqueeze(2)  # [heads, 1, 1]
    if mask is None:
        return (1.0 + factor) * attention - factor / attention.shape[-1]
    allowed = (mask == 0).to(attention.dtype)  # [windows, tokens, tokens]
    uniform = allowed / allowed.sum(-1, keepdim=True).clamp(min=1.0)
    return (1.0 + factor) * attention - factor * uniform.unsqueeze(1)


def _scores(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float | None,
    layout: str,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores [B, windows, heads, tokens, tokens], masked; v [B, windows, heads, tokens, d]; the mask [windows, tokens,
    tokens]."""
    windows = partition_windows(qkv, window, shift, layout, padding)  # [B, windows, tokens, 3*heads*d]
    q, k, v = split_heads(windows, num_heads)  # [B, windows, heads, tokens, d]
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-2, -1)
    size = [qkv.shape[1], qkv.shape[2]]
    if bias is not None:
        scores = scores + bias
        is_padding = padding_tokens(size, window, shift, qkv.device, layout)  # [windows, tokens]
        if is_padding is not None:  # such queries are dropped: what the bias has for them must not reach gradients
            scores = scores.masked_fill(is_padding.unsqueeze(1).unsqueeze(3), 0.0)
    mask = window_mask(size, window, shift, scores.dtype, scores.device, layout)
    if mask is not None and layout == "masked":  # filled, not added: what is masked may be NaN
        scores = scores.masked_fill(mask.unsqueeze(1) < 0.0, float("-inf"))
    elif mask is not None:
        scores = scores + mask.unsqueeze(1)
    return scores, v, mask


def window_attention_reference(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: str = "masked",
    padding: Tensor | None = None,
    attn_scale: Tensor | None = None,
) -> Tensor:
    """``window_attention`` in plain PyTorch operations, the attention matrix materialised."""
    size = [qkv.shape[1], qkv.shape[2]]
    scores, v, mask = _scores(qkv, num_heads, window, shift, bias, scale, layout, padding)
    attention = torch.softmax(scores, dim=-1)
    if mask is not None and layout == "masked":  # again: a row of NaN stays among tokens that attend to each other
        attention = attention.masked_fill(mask.unsqueeze(1) < 0.0, 0.0)
    if attn_scale is not None:
        attention = _high_pass(attention, mask, attn_scale)
    attention = F.dropout(attention, dropout, training=dropout > 0.0).to(v.dtype)
    out = (attention @ v).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift, layout)


# --------------------------------------------------------------------------- fused op


def is_single_tile(tokens: int, head_dim: int, bits: int) -> bool:
    """Whether Triton has all scores of a window in registers: its backward pass needs no statistics then."""
    return tokens <= 64 and head_dim <= 32 and bits == 16


@dataclass(frozen=True)
class WindowAttentionConfig:
    """Arguments that are not tensors."""

    num_heads: int
    window: list[int]
    shift: list[int]
    scale: float
    layout: str
    dropout: float = 0.0

    @property
    def compiled(self) -> tuple[Any, ...]:
        """As kernels take it: none of them has dropout."""
        return self.num_heads, self.window, self.shift, self.scale, self.layout


def _reference(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    qkv, bias, padding, attn_scale = operands
    return window_attention_reference(
        qkv, config.num_heads, config.window, config.shift, bias, config.scale, config.dropout, config.layout, padding,
        attn_scale,
    )  # fmt: skip


def _sdpa(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    """The op through torch's fused attention, which has neither forward mode nor double backward."""
    qkv, bias, padding, _ = operands
    window, shift, layout = config.window, config.shift, config.layout
    batch, size = qkv.shape[0], [qkv.shape[1], qkv.shape[2]]
    # [B, windows, heads, tokens, d]
    q, k, v = split_heads(partition_windows(qkv, window, shift, layout, padding), config.num_heads)
    windows = q.shape[1]
    mask = window_mask(size, window, shift, q.dtype, q.device, layout)  # [windows, tokens, tokens]
    bias = None if bias is None else bias.to(q.dtype)
    if mask is not None:
        mask = mask.unsqueeze(1)
        mask = mask if bias is None else mask + bias
        mask = mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [B*windows, 1 or heads, tokens, tokens]
    elif bias is not None:
        mask = bias.unsqueeze(0)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, config.dropout, scale=config.scale
    )  # [B*windows, heads, tokens, d]
    out = out.unflatten(0, (batch, windows)).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift, layout)


def _is_single_tile(qkv: Tensor, config: WindowAttentionConfig) -> bool:
    head_dim = qkv.shape[3] // (3 * config.num_heads)
    return is_single_tile(config.window[0] * config.window[1], head_dim, 8 * qkv.element_size())


def _statistics_shape(qkv: Tensor, config: WindowAttentionConfig) -> list[int]:
    if qkv.device.type == "cuda" and _is_single_tile(qkv, config):
        return [0]
    return [2, *qkv.shape[:3], config.num_heads]


def _working_type(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _statistics(operands: Operands, config: WindowAttentionConfig) -> Tensor:
    """[2, B, H, W, heads]: largest score of a row, 1 / sum of its weights; empty where the backward pass does not need
    them."""
    qkv, bias, padding, _ = operands
    if _statistics_shape(qkv, config) == [0]:
        return qkv.new_empty(0, dtype=torch.float32)
    scores = _scores(qkv, config.num_heads, config.window, config.shift, bias, config.scale, config.layout, padding)[0]
    scores = scores.to(_working_type(qkv))
    largest = scores.amax(-1)  # [B, windows, heads, tokens]
    inverse = 1.0 / torch.exp(scores - largest.unsqueeze(-1)).sum(-1)
    size = [qkv.shape[1], qkv.shape[2]]
    return torch.stack([
        merge_windows(rows.transpose(2, 3), size, config.window, config.shift, config.layout)
        for rows in (largest, inverse)
    ])  # fmt: skip


def _fake(operands: Operands, config: WindowAttentionConfig) -> Result:
    qkv = operands[0]
    statistics = qkv.new_empty(_statistics_shape(qkv, config), dtype=_working_type(qkv))
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), statistics


def _compiled(operands: Operands, config: WindowAttentionConfig) -> Result:
    """C++: csrc/window_attention.cpp."""
    _extension.extension()
    qkv, *others = operands
    return torch.ops.asvit_fast_C.window_attention(qkv, *config.compiled, *others)


def _compiled_backward(
    gradient: Tensor, operands: Operands, config: WindowAttentionConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    """Sums over windows in an order that only shapes decide."""
    _extension.extension()
    qkv, *others = operands
    return torch.ops.asvit_fast_C.window_attention_backward(
        gradient, qkv, *result, *config.compiled, *others, needs_grad[1:]
    )


def _triton(operands: Operands, config: WindowAttentionConfig) -> Result:
    """kernels/window_attention.py."""
    from asvit_fast.kernels.window_attention import window_attention

    qkv, *others = operands
    single = _is_single_tile(qkv, config)
    allocate = torch.zeros if single else torch.empty  # the zeros, without elements on a GPU, are never read
    statistics = allocate(_statistics_shape(qkv, config), dtype=torch.float32, device=qkv.device)
    return window_attention(qkv, *config.compiled, *others, None if single else statistics), statistics


def _triton_backward(
    gradient: Tensor, operands: Operands, config: WindowAttentionConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    """Sums over windows in an order that only shapes decide."""
    from asvit_fast.kernels.window_attention import window_attention_backward

    (qkv, *others), (output, statistics) = operands, result
    saved = None if _is_single_tile(qkv, config) else statistics
    return window_attention_backward(gradient, qkv, output, saved, *config.compiled, *others, needs_grad[1:])


def _no_dropout(operands: Operands, config: WindowAttentionConfig) -> str | None:
    if config.dropout == 0.0:
        return None
    if operands[3] is None:
        return f"it has no dropout, got {config.dropout}"
    return (
        "AttnScale with attention dropout has no kernel, and the reference holds every attention matrix: train without "
        "one of the two"
    )


def _sdpa_cannot(operands: Operands, config: WindowAttentionConfig) -> str | None:
    qkv, _, _, attn_scale = operands
    if qkv.device.type == "cpu" and config.dropout == 0.0 and backends.forced_backend() is None:
        return "it has no double backward"
    return None if attn_scale is None else "it has no attn_scale"


WINDOW_ATTENTION = FusedOp(
    "window_attention",
    "qkv, bias?, padding?, attn_scale?",
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


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: str = "masked",
    padding: Tensor | None = None,
    attn_scale: Tensor | None = None,
) -> Tensor:
    """Softmax attention inside windows: qkv [B, H, W, 3*heads*head_dim] -> [B, H, W, heads*head_dim].

    Args:
        qkv: the fused projection, channels ordered q | k | v, each [head][head_dim]; any floating dtype.
        num_heads: attention heads.
        window: (height, width) in tokens. Windows need not divide the map: it is padded at the end. In the layout
            "masked" a window larger than the map is the map.
        shift: (rows, columns) of the cyclic shift, below ``window``; tokens that only the shift brings together do not
            attend to each other (Swin, arXiv 2103.14030, section 3.2).
        bias: [heads, tokens, tokens], added to the scaled scores of every window (tokens = height * width; where a
            window is larger than the map, those of either). A query all of whose keys have the lowest number of the
            bias' dtype attends them alike; one whose keys have -inf is NaN, as with torch.softmax.
        scale: factor on q @ k; head_dim ** -0.5 by default.
        dropout: probability of dropping an attention weight (pass 0 in evaluation).
        layout: "masked": padding is masked out. "timm" or "torchvision": padding is attended to, the mask of the
            shift is -100, and the map is rolled before it is padded ("timm") or after ("torchvision"). "grid": the
            tokens of a window are spread evenly over a map that windows divide (MaxViT, arXiv 2204.01697, section 3.2).
        padding: [3*heads*head_dim], a token of padding in the layouts "timm" and "torchvision": the projection of
            zeros, that is its bias. Zeros by default.
        attn_scale: [heads], w of AttnScale (arXiv 2203.05962, equation 6): the attention A becomes (1 + w) A - w U, U
            uniform over the keys that the query may attend.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, naming the value. Parameters may have another
            floating dtype than qkv, whose dtype the output has.

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels: they copy nothing and keep at
    most two numbers per row. With dropout, in float64 on a GPU, and where Triton is missing, torch's fused attention,
    which has no double backward. With dropout and attn_scale plain PyTorch operations, with one warning.
    """
    if has_torch_function_unary(qkv):
        options = (bias, scale, dropout, layout, padding, attn_scale)
        return handle_torch_function(window_attention, (qkv,), qkv, num_heads, window, shift, *options)
    check_length("window_attention", "window", window, 2)
    check_length("window_attention", "shift", shift, 2)
    windows, shifts, bias = _check(
        qkv, num_heads, sizes(window), sizes(shift), bias, scale, dropout, layout, padding, attn_scale
    )
    parameters = bias is not None or padding is not None or attn_scale is not None  # so gradients are needed
    computed = qkv.device.type != "meta"  # there the op is called for its shape and what it counts
    if windows == [1, 1] and dropout == 0.0 and not parameters and computed and backends.forced_backend() is None:
        return qkv[..., qkv.shape[3] // 3 * 2 :].contiguous()  # a 1 x 1 window attends only to itself
    factor = float(qkv.shape[3] // (3 * num_heads)) ** -0.5 if scale is None else scale
    config = WindowAttentionConfig(num_heads, windows, shifts, factor, layout, dropout)
    return WINDOW_ATTENTION((qkv, bias, padding, attn_scale), config)
