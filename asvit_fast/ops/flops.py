"""FLOPs of our ops, for FlopCounterMode: two operations for a multiply-add of a matrix product or a convolution.

As torch counts its own ops: nothing for what is elementwise or a normalisation, nothing for what a backward pass
computes again, whichever implementation runs. Windowed attention counts all pairs of tokens that share a window; in the
layout "masked" padding does not count, in the others it takes part and does, as in the networks that do so.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from .. import _extension

Shape = Sequence[int]


def window_pairs(size: Shape, window: Shape, layout: str = "masked", kv_window: Shape = ()) -> int:
    """Pairs of a query and a key that share a window, of one map of ``size`` (rows, columns) or (depth, rows,
    columns)."""
    pairs = 1
    for axis, (side, length) in enumerate(zip(size, window, strict=True)):
        whole, rest = divmod(side, length)
        if kv_window:
            pairs *= _axis_pairs(side, length, kv_window[axis], layout)
            continue
        cut = rest if layout == "masked" or rest == 0 else length
        pairs *= whole * length**2 + cut**2
    return pairs


def _axis_pairs(side: int, length: int, keys: int, layout: str) -> int:
    """Pairs along one axis where windows of keys lie around those of queries."""
    if layout != "masked":
        return -(-side // length) * length * keys
    margin = (keys - length) // 2
    return sum(
        min(length, side - start) * (min(side, start + length + margin) - max(0, start - margin))
        for start in range(0, side, length)
    )


def _window_attention(
    q: Shape, k: Shape | None, v: Shape | None, bias: Any, padding: Any, attn_scale: Any, head_scale: Any,
    num_heads: int, window: Shape, shift: Shape, kv_window: Shape, scale: float, layout: str, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """q k^T and attention v; q [B, *size, 3*heads*d], or with k and v [B, *size, heads*d]."""
    channels = q[-1] // (3 if k is None else 1)
    return 4 * q[0] * channels * window_pairs(q[1:-1], window, layout, kv_window)


def _window_attention_backward(gradient: Shape, output: Shape, statistics: Shape, *arguments: Any, **__: Any) -> int:
    """Gradients of both factors of both products."""
    return 2 * _window_attention(*arguments)


def _window_attention_taylor(q: Shape, k: Shape, v: Shape, window: Shape, *_: Any, **__: Any) -> int:
    """The products of series, q [orders + 1, B, H, W, heads, d]: 1, 3 or 6 of each."""
    rows, batch, height, width, heads, head_dim = q
    return 2 * rows * (rows + 1) * batch * heads * head_dim * window_pairs((height, width), window)


def _patch_embed(image: Shape, weight: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    """A convolution: weight [C, Cin, K, K], tokens [B, Ho, Wo, C]."""
    return 2 * prod(out_shape[0][:3]) * prod(weight)


def _patch_embed_backward(gradient: Shape, image: Shape, weight: Shape, *arguments: Any, **__: Any) -> int:
    """The compiled part of it, which leaves the image to torch's convolution."""
    return 2 * prod(gradient[:3]) * prod(weight) * arguments[-1]


def _patch_merge(x: Shape, weight: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    """A Linear: weight [Cout, K*K*C], output [B, Ho, Wo, Cout]."""
    return 2 * prod(out_shape[0][:3]) * prod(weight)


def _patch_merge_backward(gradient: Shape, x: Shape, weight: Shape, *arguments: Any, **__: Any) -> int:
    """Gradients of x and weight, where they are asked for."""
    return 2 * prod(gradient[:3]) * prod(weight) * sum(arguments[-2:])


def _patch_backward_op(gradient: Shape, output: Any, saved: Shape, x: Shape, weight: Shape, *arguments: Any,
                       **__: Any) -> int:  # fmt: skip
    """Gradients of x and of the parameters, where they are wanted."""
    of_x, *of_parameters = arguments[-1]
    return 2 * prod(gradient[:3]) * prod(weight) * (of_x + any(of_parameters))


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """x [*, K], weight [N, K]."""
    return 2 * prod(x) * weight[0]


def _linear_gradients(gradient: Shape, output: Any, saved: Any, x: Shape, *arguments: Any, **__: Any) -> int:
    """Gradients of x and weight, where they are asked for."""
    of_x, of_weight, *_ = arguments[-1]
    return 2 * prod(gradient) * x[-1] * (of_x + of_weight)


def _compiled_linear(x: Shape, packed: Shape, outputs: int, *_: Any, **__: Any) -> int:
    """x [*, K], outputs N."""
    return 2 * prod(x) * outputs


def _compiled_norm_linear(x: Shape, weight: Shape, bias: Shape, eps: float, packed: Shape, outputs: int, *_: Any,
                          **__: Any) -> int:  # fmt: skip
    """x [*, K], outputs N."""
    return 2 * prod(x) * outputs


def _gram(rows: Shape, **__: Any) -> int:
    """rows [B, n] with each other."""
    return 2 * rows[0] * prod(rows)


def _linear_weight_gram(x: Shape, gradient: Shape, **__: Any) -> int:
    """x [B, T, K], gradient [B, T, N]: weights [N, K] of B samples, and these with each other."""
    weight = x[-1] * gradient[-1]
    return 2 * prod(x) * gradient[-1] + 2 * x[0] ** 2 * weight


def _none(*_: Any, **__: Any) -> int:
    """Elementwise or along rows: no product."""
    return 0


_TAYLOR: dict[str, Callable[..., int]] = {
    "gelu_taylor": _none,
    "layer_norm_taylor": _none,
    "softmax_taylor": _none,
    "square_taylor": _none,
    "tanh_taylor": _none,
    "window_attention_taylor": _window_attention_taylor,
}
FORMULAS = _TAYLOR | {
    "window_attention": _window_attention,
    "window_attention_gradients": _window_attention_backward,
    "patch_embed": _patch_embed,
    "patch_embed_gradients": _patch_backward_op,
    "patch_merge": _patch_merge,
    "patch_merge_gradients": _patch_backward_op,
    "linear": _linear,
    "linear_gradients": _linear_gradients,
}
COMPILED_FORMULAS = _TAYLOR | {
    "gram": _gram,
    "layer_norm_weight_rows": _none,
    "linear": _compiled_linear,
    "linear_pack": _none,
    "linear_weight_gram": _linear_weight_gram,
    "norm_linear": _compiled_norm_linear,
    "weight_changes": _none,
    "weight_state_size": _none,
    "window_attention": _window_attention,
    "window_attention_backward": _window_attention_backward,
    "patch_embed": _patch_embed,
    "patch_embed_backward": _patch_embed_backward,
    "patch_merge": _patch_merge,
    "patch_merge_backward": _patch_merge_backward,
}


def _flop_counter() -> Any:
    """torch.utils.flop_counter, without its remark that Triton is not installed."""
    logger = logging.getLogger("torch.utils.flop_counter")
    before, logger.disabled = logger.disabled, True
    try:
        return importlib.import_module("torch.utils.flop_counter")
    finally:
        logger.disabled = before


def _register(namespace: Any, formulas: dict[str, Callable[..., int]]) -> None:
    counter = _flop_counter()
    for name, formula in formulas.items():
        op = getattr(namespace, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)


def register() -> None:
    """Register the formulas of all ops, and of the compiled ones as soon as they are loaded."""
    _register(torch.ops.asvit_fast, FORMULAS)
    _extension.when_loaded(lambda: _register(torch.ops.asvit_fast_C, COMPILED_FORMULAS))
