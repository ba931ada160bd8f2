"""Attention inside (shifted) windows of a channels-last feature map, straight from the fused qkv projection.

The reference is made of elementary torch operations: any device and dtype, double backward, functorch, forward mode,
export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _extension, backends
from ..errors import InputError
from .checks import check_devices, check_floats, check_length, check_operand, check_scale
from .decomposition import register_decomposition
from .optional import double_backward, gradients, present, restored
from .transforms import sizes, transform_active
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
        raise InputError(f"window_attention: nobody attends padding in the layout {layout}, so it has no values")
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
    """``window_attention`` in elementary operations, the attention matrix materialised."""
    size = [qkv.shape[1], qkv.shape[2]]
    scores, v, mask = _scores(qkv, num_heads, window, shift, bias, scale, layout, padding)
    attention = torch.softmax(scores, dim=-1)
    if mask is not None and layout == "masked":  # again: a row of NaN stays among those who attend each other
        attention = attention.masked_fill(mask.unsqueeze(1) < 0.0, 0.0)
    if attn_scale is not None:
        attention = _high_pass(attention, mask, attn_scale)
    attention = F.dropout(attention, dropout, training=dropout > 0.0).to(v.dtype)
    out = (attention @ v).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift, layout)


def _window_attention_sdpa(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
    layout: str,
    padding: Tensor | None,
) -> Tensor:
    """The same through torch's fused attention, which has neither forward mode nor double backward."""
    batch, size = qkv.shape[0], [qkv.shape[1], qkv.shape[2]]
    # [B, windows, heads, tokens, d]
    q, k, v = split_heads(partition_windows(qkv, window, shift, layout, padding), num_heads)
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
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask, dropout_p=dropout, scale=scale
    )  # [B*windows, heads, tokens, d]
    out = out.unflatten(0, (batch, windows)).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift, layout)


# --------------------------------------------------------------------------- fused op

Result = tuple[Tensor, Tensor]  # output, statistics
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # qkv, bias, padding, attn_scale
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of the operands; empty where not asked for
WHOLE_TOKENS, WHOLE_HEAD_DIM = 64, 32  # up to which, in 16 bits, Triton kernels keep a whole window in registers


class Settings(NamedTuple):
    """What is not a tensor."""

    num_heads: int
    window: list[int]
    shift: list[int]
    scale: float
    layout: str


def _compiled(operands: Operands, settings: Settings) -> Result:
    """C++: csrc/window_attention.cpp."""
    _extension.extension()
    qkv, *others = operands
    return torch.ops.asvit_fast_C.window_attention(qkv, *settings, *others)


def _reference(operands: Sequence[Any], settings: Settings) -> Tensor:
    qkv, bias, padding, attn_scale = operands
    num_heads, window, shift, scale, layout = settings
    return window_attention_reference(
        qkv, num_heads, window, shift, bias, scale, layout=layout, padding=padding, attn_scale=attn_scale
    )


def _whole(qkv: Tensor, num_heads: int, window: list[int]) -> bool:
    """Whether the backward kernel on a GPU has all scores of a window at once: it needs no statistics then."""
    fits = window[0] * window[1] <= WHOLE_TOKENS and qkv.shape[3] <= 3 * num_heads * WHOLE_HEAD_DIM
    return fits and qkv.element_size() == 2


def _statistics_shape(qkv: Tensor, num_heads: int, window: list[int]) -> list[int]:
    if qkv.device.type == "cuda" and _whole(qkv, num_heads, window):
        return [0]
    return [2, *qkv.shape[:3], num_heads]


def _working_type(qkv: Tensor) -> torch.dtype:
    return torch.float64 if qkv.dtype == torch.float64 else torch.float32


def _elementary(operands: Operands, settings: Settings) -> Result:
    """The reference, with the statistics that fused backward passes need."""
    qkv, bias, padding, _ = operands
    num_heads, window, shift, scale, layout = settings
    output = _reference(operands, settings).contiguous()
    if _statistics_shape(qkv, num_heads, window) == [0]:
        return output, qkv.new_empty(0, dtype=torch.float32)
    scores = _scores(qkv, num_heads, window, shift, bias, scale, layout, padding)[0].to(_working_type(qkv))
    largest = scores.amax(-1)  # [B, windows, heads, tokens]
    inverse = 1.0 / torch.exp(scores - largest.unsqueeze(-1)).sum(-1)
    size = [qkv.shape[1], qkv.shape[2]]
    maps = [merge_windows(rows.transpose(2, 3), size, window, shift, layout) for rows in (largest, inverse)]
    return output, torch.stack(maps)  # [2, B, H, W, heads]


def _check_triton(qkv: Tensor) -> None:
    if qkv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"window_attention: the triton backend computes in float32, got {qkv.dtype}: use reference")


def _triton(operands: Operands, settings: Settings) -> Result:
    """kernels/window_attention.py."""
    from asvit_fast.kernels.window_attention import window_attention

    qkv, *others = operands
    _check_triton(qkv)
    whole = _whole(qkv, settings.num_heads, settings.window)
    allocate = torch.zeros if whole else torch.empty  # the zeros, without elements on a GPU, are never read
    shape = _statistics_shape(qkv, settings.num_heads, settings.window)
    statistics = allocate(shape, dtype=torch.float32, device=qkv.device)
    return window_attention(qkv, *settings, *others, None if whole else statistics), statistics


backends.declare("window_attention", triton=_triton, cpu=_compiled, reference=_elementary)


@torch.library.custom_op("asvit_fast::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: Tensor | None,
    padding: Tensor | None,
    attn_scale: Tensor | None,
) -> Result:
    """The output [B, H, W, heads*d], and [2, B, H, W, heads]: largest score of a row, 1 / sum of its weights (empty
    where the backward pass does not need them)."""
    run = backends.select("window_attention", qkv.device)
    return run((qkv, bias, padding, attn_scale), Settings(num_heads, window, shift, scale, layout))


@_window_attention.register_fake
def _fake(qkv, num_heads, window, shift, scale, layout, bias, padding, attn_scale) -> Result:
    check_devices("window_attention", qkv, bias=bias, padding=padding, attn_scale=attn_scale)
    statistics = qkv.new_empty(_statistics_shape(qkv, num_heads, window), dtype=_working_type(qkv))
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), statistics


def _decomposition(qkv, num_heads, window, shift, scale, layout, bias, padding, attn_scale) -> Result:
    output = _reference((qkv, bias, padding, attn_scale), Settings(num_heads, window, shift, scale, layout))
    return output.contiguous(), _fake(qkv, num_heads, window, shift, scale, layout, bias, padding, attn_scale)[1]


register_decomposition(_window_attention, _decomposition)


# --------------------------------------------------------------------------- autograd


def _elementary_backward(gradient: Tensor, operands: Operands, settings: Settings, wanted: list[bool]) -> Gradients:
    found = gradients(lambda given: _reference(given, settings), gradient, operands)
    to_qkv, to_bias, to_padding, to_attn_scale = (
        to.contiguous() if to is not None and want else gradient.new_empty(0)
        for to, want in zip(found, [True, *wanted], strict=True)
    )
    return to_qkv, to_bias, to_padding, to_attn_scale


@torch.library.custom_op("asvit_fast::window_attention_backward", mutates_args=())
def _window_attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    output: Tensor,
    statistics: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
    layout: str,
    bias: Tensor | None,
    padding: Tensor | None,
    attn_scale: Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients of qkv and, where `wanted`, of bias, padding and attn_scale; sums over windows in an order that only
    shapes decide."""
    settings, others = Settings(num_heads, window, shift, scale, layout), (bias, padding, attn_scale)
    implementation = backends.select("window_attention", qkv.device)
    if implementation is _elementary:
        return _elementary_backward(gradient, (qkv, *others), settings, wanted)
    if implementation is _triton:
        from asvit_fast.kernels.window_attention import window_attention_backward

        _check_triton(qkv)
        kept = None if _whole(qkv, num_heads, window) else statistics
        return window_attention_backward(gradient, qkv, output, kept, *settings, *others, wanted)
    _extension.extension()
    return torch.ops.asvit_fast_C.window_attention_backward(
        gradient, qkv, output, statistics, *settings, *others, wanted
    )


@_window_attention_backward.register_fake
def _fake_backward(
    gradient, qkv, output, statistics, num_heads, window, shift, scale, layout, bias, padding, attn_scale, wanted
) -> Gradients:
    check_devices("window_attention_backward", qkv, gradient=gradient, output=output, statistics=statistics)
    check_devices("window_attention_backward", qkv, bias=bias, padding=padding, attn_scale=attn_scale)
    to_bias, to_padding, to_attn_scale = (
        tensor.new_empty(tensor.shape) if tensor is not None and want else qkv.new_empty(0)
        for tensor, want in zip((bias, padding, attn_scale), wanted, strict=True)
    )
    return qkv.new_empty(qkv.shape), to_bias, to_padding, to_attn_scale


def _setup_context(ctx, inputs, output: Result) -> None:
    qkv, *settings, bias, padding, attn_scale = inputs
    operands = (qkv, bias, padding, attn_scale)
    ctx.settings, ctx.there = Settings(*settings), [x is not None for x in operands]
    ctx.save_for_backward(*output, *present(operands))
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _: Tensor | None):
    if gradient is None:
        return (None,) * 9
    output, statistics, *tensors = ctx.saved_tensors
    qkv, *others = restored(tensors, ctx.there)
    wanted = [there and need for there, need in zip(ctx.there[1:], ctx.needs_input_grad[6:], strict=True)]
    to_qkv, *found = _window_attention_backward(gradient, qkv, output, statistics, *ctx.settings, *others, wanted)
    return to_qkv, *(None,) * 5, *(to if want else None for to, want in zip(found, wanted, strict=True))


_window_attention.register_autograd(_backward, setup_context=_setup_context)


def _setup_double(ctx, inputs, output: Gradients) -> None:
    gradient, qkv, _, _, *settings, bias, padding, attn_scale, wanted = inputs
    operands = (qkv, bias, padding, attn_scale)
    ctx.settings, ctx.asked = Settings(*settings), [True, *wanted]
    ctx.there = [x is not None for x in operands]
    ctx.save_for_backward(gradient, *present(operands))


def _double_backward(ctx, *cotangents: Tensor):
    """In elementary operations, so that it can be differentiated again."""
    to_gradient, (to_qkv, *others) = double_backward(
        lambda given: _reference(given, ctx.settings), ctx.there, ctx.asked, ctx.saved_tensors, cotangents
    )
    return to_gradient, to_qkv, *(None,) * 7, *others, None


_window_attention_backward.register_autograd(_double_backward, setup_context=_setup_double)

# --------------------------------------------------------------------------- public


def _fused(qkv: Tensor, dropout: float) -> bool:
    """Whether the fused op runs, elementary or torch's fused operations otherwise. A forced backend is obeyed."""
    forced = backends.forced_backend()
    if forced is not None:
        implementation = backends.select("window_attention", qkv.device)
        if implementation is not _elementary and dropout > 0.0:
            raise InputError(f"window_attention: the {forced} backend has no dropout, got {dropout}")
        return implementation is not _elementary
    if dropout > 0.0 or qkv.device.type not in ("cpu", "cuda", "meta"):
        return False
    if qkv.device.type != "cuda":
        return True
    why = backends.unavailable_on("triton", qkv.device.type, qkv.device.index)
    if why is not None:
        _say_unavailable(why)
    return why is None and qkv.dtype != torch.float64


@torch.compiler.assume_constant_result  # said while tracing
def _say_unavailable(why: str) -> None:
    backends.notify_once(why, f"asvit_fast runs torch's attention for window_attention on cuda: {why}")


@torch.compiler.assume_constant_result  # said while tracing
def _say_elementary() -> None:
    backends.notify_once(
        "window_attention attn_scale with dropout",
        "asvit_fast: AttnScale with attention dropout has no kernel: window_attention runs in elementary operations, "
        "which hold every attention matrix; train without one of the two",
    )


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
            attend each other (Swin, arXiv 2103.14030, section 3.2).
        bias: [heads, tokens, tokens], added to the scaled scores of every window (tokens = height * width; where a
            window is larger than the map, those of either). A query all of whose keys have the lowest number of the
            bias' dtype attends them alike; one whose keys have -inf is NaN, as with torch.softmax.
        scale: factor on q @ k; head_dim ** -0.5 by default.
        dropout: probability of dropping an attention weight (pass 0 in evaluation).
        layout: "masked": padding is attended by nobody. "timm" or "torchvision": padding is attended, the mask of the
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
    which has no double backward. With dropout and attn_scale elementary operations, which is said once.
    """
    if not torch.jit.is_scripting():
        if has_torch_function_unary(qkv):
            options = (bias, scale, dropout, layout, padding, attn_scale)
            return handle_torch_function(window_attention, (qkv,), qkv, num_heads, window, shift, *options)
        check_length("window_attention", "window", window, 2)
        check_length("window_attention", "shift", shift, 2)
    windows, shifts = [window[0], window[1]], [shift[0], shift[1]]
    if not torch.jit.is_scripting():
        windows, shifts = sizes(windows), sizes(shifts)
    windows, shifts, bias = _check(qkv, num_heads, windows, shifts, bias, scale, dropout, layout, padding, attn_scale)
    elementary = qkv.numel() == 0 or attn_scale is not None
    if not torch.jit.is_scripting():
        parameters = bias is not None or padding is not None or attn_scale is not None  # which would have gradients
        computed = qkv.device.type != "meta"  # there the op is called for its shape and what it counts
        if windows == [1, 1] and dropout == 0.0 and not parameters and computed and backends.forced_backend() is None:
            return qkv[..., qkv.shape[3] // 3 * 2 :].contiguous()  # a token that is alone attends itself
        if qkv.numel() > 0 and not transform_active() and _fused(qkv, dropout):
            factor = float(qkv.shape[3] // (3 * num_heads)) ** -0.5 if scale is None else scale
            return _window_attention(qkv, num_heads, windows, shifts, factor, layout, bias, padding, attn_scale)[0]
        required = transform_active() or backends.forced_backend() is not None or qkv.dtype == torch.float64
        if attn_scale is not None and dropout > 0.0 and not required:
            _say_elementary()
        elementary = elementary or required
    if elementary:
        return window_attention_reference(
            qkv, num_heads, windows, shifts, bias, scale, dropout, layout, padding, attn_scale
        )
    return _window_attention_sdpa(qkv, num_heads, windows, shifts, bias, scale, dropout, layout, padding)
