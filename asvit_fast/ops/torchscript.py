"""References that torch.jit.script compiles in place of our ops.

torch deprecates TorchScript; timm's tests of models still ask for it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .linear import linear, linear_reference
from .patch_embed import patch_embed, patch_embed_reference
from .patch_merge import patch_merge, patch_merge_reference
from .position_bias import position_bias, position_bias_reference
from .window_attention import window_attention, window_attention_reference
from .windows import fit_windows, lowest_scores


def _window_attention(
    qkv: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layout: str = "masked",
    padding: Tensor | None = None,
    attn_scale: Tensor | None = None,
) -> Tensor:
    windows, shifts = [window[0], window[1]], [0, 0] if shift is None else [shift[0], shift[1]]
    if layout == "masked":
        windows, shifts, bias = fit_windows([qkv.shape[1], qkv.shape[2]], windows, shifts, bias)
    bias = None if bias is None else lowest_scores(bias, qkv)
    return window_attention_reference(
        [qkv], num_heads, windows, shifts, bias, scale, dropout, layout, padding, attn_scale
    )


def _compile_instead(op: Callable[..., Tensor], function: Callable[..., Tensor]) -> None:
    op.__prepare_scriptable__ = lambda: function  # type: ignore[attr-defined]  # asked for by torch.jit


def register() -> None:
    for op, function in (
        (linear, linear_reference),
        (patch_embed, patch_embed_reference),
        (patch_merge, patch_merge_reference),
        (position_bias, position_bias_reference),
        (window_attention, _window_attention),
    ):
        _compile_instead(op, function)
