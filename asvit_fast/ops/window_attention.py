"""Attention inside (shifted) windows of a channels-last feature map, straight from the fused qkv projection.

The reference is made of elementary torch operations: any device and dtype, double backward, functorch, forward mode,
export.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _extension, backends
from ..errors import InputError
from .transforms import transform_active


def window_padding(size: int, window: int) -> int:
    """Tokens to append so that windows of ``window`` tokens cover ``size`` tokens."""
    return -size % window


def partition_windows(x: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """Cut [B, H, W, C] into [B, windows, tokens, C]: zero-pad at the end, roll by ``-shift``, cut."""
    height, width = window[0], window[1]
    x = F.pad(x, (0, 0, 0, window_padding(x.shape[2], width), 0, window_padding(x.shape[1], height)))
    if shift[0] != 0 or shift[1] != 0:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // height, height, columns // width, width, channels)
    return x.transpose(2, 3).reshape(batch, (rows // height) * (columns // width), height * width, channels)


def merge_windows(x: Tensor, size: list[int], window: list[int], shift: list[int]) -> Tensor:
    """The inverse of ``partition_windows``: [B, windows, tokens, C] -> [B, H, W, C], padding dropped."""
    height, width = window[0], window[1]
    rows = size[0] + window_padding(size[0], height)
    columns = size[1] + window_padding(size[1], width)
    batch, channels = x.shape[0], x.shape[3]
    x = x.reshape(batch, rows // height, columns // width, height, width, channels)
    x = x.transpose(2, 3).reshape(batch, rows, columns, channels)
    if shift[0] != 0 or shift[1] != 0:
        x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
    return x[:, : size[0], : size[1]]


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Region of every (padded, rolled) position along one axis: 0 body, 1 and 2 the two parts that a shift brings
    together in the last window, 3 padding."""
    padded = size + window_padding(size, window)
    position = torch.arange(padded, device=device)
    region = torch.zeros_like(position)
    if shift > 0:
        region = (position >= padded - window).to(region.dtype) + (position >= padded - shift).to(region.dtype)
    return torch.where((position + shift) % padded >= size, 3, region)


def window_mask(
    size: list[int], window: list[int], shift: list[int], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Additive mask [windows, tokens, tokens] of who may attend whom; None when everybody may.

    A key counts when it is a real token (not padding) of the query's own region of the shifted map. The mask is finite,
    so that rows of padding stay finite too: they are dropped afterwards, but a NaN in them would reach the gradients.
    """
    padded = window_padding(size[0], window[0]) > 0 or window_padding(size[1], window[1]) > 0
    if not padded and shift[0] == 0 and shift[1] == 0:
        return None
    rows = _regions(size[0], window[0], shift[0], device)  # [H']
    columns = _regions(size[1], window[1], shift[1], device)  # [W']
    is_padding = (rows == 3).unsqueeze(1) | (columns == 3).unsqueeze(0)  # [H', W']
    region = (4 * rows.unsqueeze(1) + columns.unsqueeze(0)).masked_fill(is_padding, -1)  # [H', W']
    region = partition_windows(region[None, :, :, None], window, [0, 0])[0, :, :, 0]  # [windows, tokens]
    allowed = (region.unsqueeze(1) == region.unsqueeze(2)) & (region.unsqueeze(1) >= 0)  # [windows, query, key]
    masked = -3.0e4  # nothing after the exponential, and still a float16
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, masked)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, windows, tokens, 3*heads*d] -> three times [B, windows, heads, tokens, d]."""
    batch, windows, tokens, channels = qkv.shape
    qkv = qkv.reshape(batch, windows, tokens, 3, num_heads, channels // (3 * num_heads)).permute(3, 0, 1, 4, 2, 5)
    return qkv[0], qkv[1], qkv[2]


def _check(qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None) -> None:
    if qkv.dim() != 4:
        raise ValueError(f"window_attention: qkv must be [B, H, W, 3*heads*head_dim], got {qkv.dim()} dimensions")
    if num_heads < 1 or qkv.shape[3] % (3 * num_heads) != 0 or qkv.shape[3] == 0:
        raise ValueError(f"window_attention: {qkv.shape[3]} channels are not 3 * {num_heads} heads * head_dim")
    if window[0] < 1 or window[1] < 1:
        raise ValueError(f"window_attention: window must be positive, got {window[0]} x {window[1]}")
    if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
        raise ValueError(f"window_attention: shift must be from 0 to window - 1, got {shift[0]}, {shift[1]}")
    if bias is not None:
        tokens = window[0] * window[1]
        if bias.dim() != 3 or bias.shape[0] != num_heads or bias.shape[1] != tokens or bias.shape[2] != tokens:
            raise ValueError(f"window_attention: bias must be [{num_heads}, {tokens}, {tokens}]")


def window_attention_reference(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``window_attention`` in elementary operations, the attention matrix materialised."""
    size = [qkv.shape[1], qkv.shape[2]]
    q, k, v = split_heads(partition_windows(qkv, window, shift), num_heads)  # [B, windows, heads, tokens, d]
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    scores = (q * factor) @ k.transpose(-2, -1)  # [B, windows, heads, tokens, tokens]
    if bias is not None:
        scores = scores + bias
    mask = window_mask(size, window, shift, scores.dtype, scores.device)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    attention = F.dropout(torch.softmax(scores, dim=-1), dropout, training=dropout > 0.0)
    out = (attention @ v).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift)


def _window_attention_sdpa(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """The same through torch's fused attention, which has neither forward mode nor double backward."""
    batch, size = qkv.shape[0], [qkv.shape[1], qkv.shape[2]]
    q, k, v = split_heads(partition_windows(qkv, window, shift), num_heads)  # [B, windows, heads, tokens, d]
    windows = q.shape[1]
    mask = window_mask(size, window, shift, q.dtype, q.device)  # [windows, tokens, tokens]
    if mask is not None:
        mask = mask.unsqueeze(1)
        mask = mask if bias is None else mask + bias
        mask = mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [B*windows, 1 or heads, tokens, tokens]
    elif bias is not None:
        mask = bias.unsqueeze(0)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask, dropout_p=dropout, scale=scale
    )  # [B*windows, heads, tokens, d]
    out = out.unflatten(0, (batch, windows)).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift)


# --------------------------------------------------------------------------- fused op

Result = tuple[Tensor, Tensor]
WHOLE_TOKENS, WHOLE_HEAD_DIM = 64, 32  # up to which, in 16 bits, Triton kernels keep a whole window in registers


def _compiled(
    qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Result:
    """C++: csrc/window_attention.cpp."""
    _extension.extension()
    return torch.ops.asvit_fast_C.window_attention(qkv, num_heads, window, shift, bias, scale)


def _elementary(
    qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Result:
    """The reference, with nothing kept for the backward pass."""
    return window_attention_reference(qkv, num_heads, window, shift, bias, scale).contiguous(), qkv.new_empty(0)


def _whole(qkv: Tensor, num_heads: int, window: list[int]) -> bool:
    """Whether the backward kernel on a GPU has all scores of a window at once: it needs no statistics then."""
    fits = window[0] * window[1] <= WHOLE_TOKENS and qkv.shape[3] <= 3 * num_heads * WHOLE_HEAD_DIM
    return fits and qkv.element_size() == 2


def _statistics_shape(qkv: Tensor, num_heads: int, window: list[int]) -> list[int]:
    if qkv.device.type == "cuda" and _whole(qkv, num_heads, window):
        return [0]
    return [2, *qkv.shape[:3], num_heads]


def _check_triton(qkv: Tensor) -> None:
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"window_attention: the triton backend computes in float32, got {qkv.dtype}: use reference")


def _triton(
    qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Result:
    """kernels/window_attention.py."""
    from asvit_fast.kernels.window_attention import window_attention

    _check_triton(qkv)
    whole = _whole(qkv, num_heads, window)
    allocate = torch.zeros if whole else torch.empty  # the zeros, without elements on a GPU, are never read
    statistics = allocate(_statistics_shape(qkv, num_heads, window), dtype=torch.float32, device=qkv.device)
    kept = None if whole else statistics
    return window_attention(qkv, num_heads, window, shift, bias, scale, kept), statistics


backends.declare("window_attention", triton=_triton, cpu=_compiled, reference=_elementary)


@torch.library.custom_op("asvit_fast::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Result:
    """The output [B, H, W, heads*d], and [2, B, H, W, heads]: largest score of a row, 1 / sum of its weights (empty
    where the backward pass does not need them)."""
    return backends.select("window_attention", qkv.device)(qkv, num_heads, window, shift, bias, scale)


@_window_attention.register_fake
def _fake(
    qkv: Tensor, num_heads: int, window: list[int], shift: list[int], bias: Tensor | None, scale: float
) -> Result:
    working = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    statistics = qkv.new_empty(_statistics_shape(qkv, num_heads, window), dtype=working)
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), statistics


# --------------------------------------------------------------------------- autograd


def _vector_jacobian_product(
    num_heads: int, window: list[int], shift: list[int], scale: float
) -> Callable[..., tuple[Tensor, ...]]:
    """(gradient of the output, qkv, and the bias if there is one) -> gradients of qkv and bias, through the reference:
    differentiable in all of them."""

    def product(gradient: Tensor, qkv: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        def reference(qkv: Tensor, *bias: Tensor) -> Tensor:
            table = bias[0] if bias else None
            return window_attention_reference(qkv, num_heads, window, shift, table, scale)

        return torch.func.vjp(reference, qkv, *bias)[1](gradient)

    return product


@torch.library.custom_op("asvit_fast::window_attention_backward", mutates_args=())
def _window_attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    output: Tensor,
    statistics: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float,
    bias_gradient: bool,
) -> Result:
    """Gradients of qkv and bias (empty unless asked for); sums over windows in an order that only shapes decide."""
    implementation = backends.select("window_attention", qkv.device)
    forward_by_reference = list(statistics.shape) != _statistics_shape(qkv, num_heads, window)
    if implementation is _elementary or forward_by_reference:
        product = _vector_jacobian_product(num_heads, window, shift, scale)
        to_qkv, *to_bias = product(gradient, qkv, *([] if bias is None else [bias]))
        return to_qkv.contiguous(), to_bias[0].contiguous() if bias_gradient else qkv.new_empty(0)
    if implementation is _triton:
        from asvit_fast.kernels.window_attention import window_attention_backward

        _check_triton(qkv)
        kept = None if _whole(qkv, num_heads, window) else statistics
        return window_attention_backward(
            gradient, qkv, output, kept, num_heads, window, shift, bias, scale, bias_gradient
        )
    _extension.extension()
    return torch.ops.asvit_fast_C.window_attention_backward(
        gradient, qkv, output, statistics, num_heads, window, shift, bias, scale, bias_gradient
    )


@_window_attention_backward.register_fake
def _fake_backward(gradient, qkv, output, statistics, num_heads, window, shift, bias, scale, bias_gradient) -> Result:
    to_bias = bias.new_empty(bias.shape) if bias is not None and bias_gradient else qkv.new_empty(0)
    return qkv.new_empty(qkv.shape), to_bias


def _setup_context(ctx, inputs, output: Result) -> None:
    qkv, *ctx.settings, bias, ctx.scale = inputs  # num_heads, window, shift
    ctx.has_bias = bias is not None
    ctx.save_for_backward(qkv, *output, *([] if bias is None else [bias]))
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _: Tensor | None):
    if gradient is None:
        return None, None, None, None, None, None
    qkv, output, statistics, *bias = ctx.saved_tensors
    wanted = ctx.has_bias and ctx.needs_input_grad[4]
    to_qkv, to_bias = _window_attention_backward(
        gradient, qkv, output, statistics, *ctx.settings, bias[0] if bias else None, ctx.scale, wanted
    )
    return to_qkv, None, None, None, to_bias if wanted else None, None


_window_attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_double(ctx, inputs, output: Result) -> None:
    gradient, qkv, _, _, *ctx.settings, bias, ctx.scale, ctx.bias_gradient = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(gradient, qkv, *([] if bias is None else [bias]))


def _double_backward(ctx, to_qkv: Tensor, to_bias: Tensor):
    """In elementary operations, so that it can be differentiated again."""
    num_heads, window, shift = ctx.settings
    product = _vector_jacobian_product(num_heads, window, shift, ctx.scale)
    bias_cotangent = to_bias if ctx.bias_gradient else torch.zeros_like(ctx.saved_tensors[-1])
    cotangents = (to_qkv, bias_cotangent) if ctx.has_bias else (to_qkv,)
    gradients = torch.func.vjp(product, *ctx.saved_tensors)[1](cotangents)
    return gradients[0], gradients[1], None, None, None, None, None, gradients[2] if ctx.has_bias else None, None, None


_window_attention_backward.register_autograd(_double_backward, setup_context=_setup_double)

# --------------------------------------------------------------------------- public


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention inside windows: qkv [B, H, W, 3*heads*head_dim] -> [B, H, W, heads*head_dim].

    Args:
        qkv: the fused projection, channels ordered q | k | v, each [head][head_dim]; any floating dtype.
        num_heads: attention heads.
        window: (height, width) in tokens. Windows need not divide the map: it is padded at the end, padding is masked.
        shift: (rows, columns) of the cyclic shift, below ``window``; tokens that only the shift brings together do not
            attend each other (Swin, arXiv 2103.14030, section 3.2).
        bias: [heads, tokens, tokens], added to the scaled scores of every window (tokens = height * width).
        scale: factor on q @ k; head_dim ** -0.5 by default.
        dropout: probability of dropping an attention weight (pass 0 in evaluation).

    Raises:
        ValueError: shapes that do not fit, naming the value.

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels (elementary operations in
    float64): they copy nothing and keep at most two numbers per row. With dropout, torch's fused attention, which has
    no double backward.
    """
    windows, shifts = [window[0], window[1]], [shift[0], shift[1]]
    elementary = qkv.numel() == 0
    if not torch.jit.is_scripting():
        if has_torch_function_unary(qkv):
            return handle_torch_function(window_attention, (qkv,), qkv, num_heads, window, shift, bias, scale, dropout)
        _check(qkv, num_heads, windows, shifts, bias)
        elementary = elementary or transform_active()
        forced = backends.forced_backend()
        if forced is not None:
            implementation = backends.select("window_attention", qkv.device)
            elementary = elementary or implementation is _elementary
        elif qkv.device.type == "cuda" and qkv.dtype == torch.float64:
            elementary = True
        if not elementary and (forced is not None or (qkv.device.type in ("cpu", "cuda") and dropout == 0.0)):
            if dropout > 0.0:
                raise InputError(f"window_attention: the {forced} backend has no dropout, got {dropout}")
            factor = float(qkv.shape[3] // (3 * num_heads)) ** -0.5 if scale is None else scale
            return _window_attention(qkv, num_heads, windows, shifts, bias, factor)[0]
    _check(qkv, num_heads, windows, shifts, bias)
    if elementary:
        return window_attention_reference(qkv, num_heads, windows, shifts, bias, scale, dropout)
    return _window_attention_sdpa(qkv, num_heads, windows, shifts, bias, scale, dropout)
