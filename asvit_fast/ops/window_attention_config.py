"""Arguments of window attention that are no tensors: their checks, and the form in which the op takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .checks import check_length, check_operand, check_probability, check_scale, check_tensor, once_per_arguments
from .transforms import sizes
from .windows import check_channels, check_kv_window, check_windows, fit_windows, lowest_scores, window_padding


@dataclass(frozen=True)
class WindowAttentionConfig:
    """Arguments that are not tensors."""

    num_heads: int
    window: list[int]
    shift: list[int]
    kv_window: list[int]  # as window where keys come from the same ones
    scale: float
    layout: str
    dropout: float = 0.0

    @property
    def key_window(self) -> list[int] | None:
        """Windows of keys around those of queries, if there are such."""
        return None if self.kv_window == self.window else self.kv_window

    @property
    def kernel_arguments(self) -> tuple[int, list[int], list[int], list[int], float, str]:
        """As kernels take them: none has dropout."""
        return self.num_heads, self.window, self.shift, self.key_window or [], self.scale, self.layout


def _check_projections(op: str, projections: list[Tensor], axes: int, num_heads: int) -> None:
    """InputError unless this is a map [B, *size, 3*heads*head_dim], or three maps [B, *size, heads*head_dim]."""
    first, *others = projections
    shape, names = list(first.shape), ("q", "k", "v") if others else ("qkv",)
    size, factor = "H, W" if axes == 2 else "D, H, W", "" if others else "3*"
    if first.dim() != axes + 2:
        raise InputError(f"{op}: {names[0]} must be [B, {size}, {factor}heads*head_dim], got {shape}")
    check_channels(op, shape[-1], num_heads, 1 if others else 3)
    for name, x in zip(names, projections, strict=True):
        check_operand(op, name, x, shape, first)
        if x.dtype != first.dtype:
            raise InputError(f"{op}: {name} must be {first.dtype} as q is, got {x.dtype}")


def split_scale(scale: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A number, and a factor for each head; torch.jit.trace makes tensors of numbers."""
    if isinstance(scale, Tensor) and not (torch.jit.is_tracing() and scale.dim() == 0):
        return 1.0, scale
    return scale, None  # type: ignore[return-value]


@once_per_arguments
def make_config(
    x: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    window: tuple[int, ...],
    shift: tuple[int, ...] | None,
    bias: Tensor | None,
    factor: float | None,
    head_scale: Tensor | None,
    dropout: float,
    layout: str,
    padding: Tensor | None,
    attn_scale: Tensor | None,
    kv_window: tuple[int, ...] | None,
) -> WindowAttentionConfig:
    """Arguments that are no tensors, as the op takes them; InputError where any do not fit."""
    op = "window_attention"
    check_tensor(op, "qkv" if k is None else "q", x)
    axes = 3 if x.dim() == 5 else 2
    check_length(op, "window", window, axes)
    shift = (0,) * axes if shift is None else shift
    check_length(op, "shift", shift, axes)
    if kv_window is not None:
        check_length(op, "kv_window", kv_window, axes)
    keys = None if kv_window is None else sizes(kv_window)
    projections = [x] if k is None or v is None else [x, k, v]
    windows, shifts = _check(
        projections, num_heads, sizes(window), sizes(shift), bias, factor, head_scale, dropout, layout, padding,
        attn_scale, keys,
    )  # fmt: skip
    channels = x.shape[-1] // (3 if k is None else 1)
    factor = float(channels // num_heads) ** -0.5 if factor is None else factor
    return WindowAttentionConfig(num_heads, windows, shifts, keys or windows, factor, layout, dropout)


def _check(
    projections: list[Tensor],
    num_heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    factor: float | None,
    head_scale: Tensor | None,
    dropout: float,
    layout: str,
    padding: Tensor | None,
    attn_scale: Tensor | None,
    kv_window: list[int] | None,
) -> tuple[list[int], list[int]]:
    """InputError for arguments that do not fit; window and shift as ``check_windows`` returns them."""
    op = "window_attention"
    x = projections[0]
    _check_projections(op, projections, len(window), num_heads)
    if layout not in ("masked", "timm", "torchvision", "grid"):
        raise InputError(f"window_attention: layout must be masked, timm, torchvision or grid, got {layout}")
    check_scale(op, factor)
    if isinstance(head_scale, Tensor) and head_scale.dim() == 0:
        raise InputError(f"{op}: scale must be a Python number, or a tensor [{num_heads}] with one for each head")
    check_operand(op, "scale", head_scale, [num_heads], x)
    check_probability(op, "dropout", dropout)
    size = list(x.shape[1:-1])
    if kv_window is not None:
        check_kv_window(op, window, shift, kv_window, layout)
    window, shift = check_windows(op, size, num_heads, window, shift, bias, x, layout, kv_window)[:2]
    if layout == "grid":
        if max(shift) != 0:
            raise InputError(f"window_attention: the layout grid has no shift, got {shift}")
        if any(window_padding(n, w) != 0 for n, w in zip(size, window, strict=True)):
            raise InputError(f"window_attention: in the layout grid windows divide the map, got {window} for {size}")
    if padding is not None and (layout == "masked" or layout == "grid"):
        raise InputError(f"window_attention: padding is masked out in the layout {layout}, so it has no values")
    check_operand(op, "padding", padding, [len(projections) * x.shape[-1]], x)
    check_operand(op, "attn_scale", attn_scale, [num_heads], x)
    return window, shift


def fitting_bias(
    bias: Tensor, x: Tensor, window: tuple[int, ...], shift: tuple[int, ...] | None, config: WindowAttentionConfig
) -> Tensor:
    """The bias of windows that fit the map, if they had to be fitted."""
    if config.window != list(window):
        shifts = [0] * len(window) if shift is None else list(shift)
        bias = fit_windows(list(x.shape[1:-1]), list(window), shifts, bias)[2]  # type: ignore[assignment]
    return lowest_scores(bias, x)
