"""Cutting a channels-last map into windows, and which tokens of a window attend each other, by layout.

- "masked": zeros are appended until windows cover the map, which is then rolled. Padding is masked out, and tokens
  that only the roll brings together do not attend to each other.
- "timm", "torchvision": as Swin's public implementations do it. Padding is attended like any token, and its projection
  is a vector of its own; tokens that only the roll brings together get -100 on their score. timm rolls the map and pads
  it then, torchvision pads first: on a map that windows divide they are the same.
- "grid": the tokens of a window are spread evenly over the map (the grid attention of MaxViT, arXiv 2204.01697, section
  3.2). Windows divide the map, nothing is rolled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .checks import check_integer, check_operand


def window_padding(size: int, window: int) -> int:
    """Tokens to append so that windows of ``window`` tokens cover ``size`` tokens."""
    return -size % window


def _pad(x: Tensor, window: list[int], padding: Tensor | None) -> Tensor:
    """[B, H, W, C] -> [B, H', W', C]: what is appended is zeros, or `padding` [C]."""
    size = [x.shape[1], x.shape[2]]
    below, right = window_padding(size[0], window[0]), window_padding(size[1], window[1])
    if below == 0 and right == 0:
        return x
    x = F.pad(x, (0, 0, 0, right, 0, below))
    if padding is None:
        return x
    rows = torch.arange(size[0] + below, device=x.device) >= size[0]  # [H']
    columns = torch.arange(size[1] + right, device=x.device) >= size[1]  # [W']
    appended = rows.unsqueeze(1) | columns.unsqueeze(0)  # [H', W']
    return torch.where(appended.unsqueeze(2), padding.to(x.dtype), x)


def _roll(x: Tensor, shift: list[int], sign: int) -> Tensor:
    if shift[0] == 0 and shift[1] == 0:
        return x
    return torch.roll(x, shifts=(sign * shift[0], sign * shift[1]), dims=(1, 2))


def partition_windows(
    x: Tensor, window: list[int], shift: list[int], layout: str = "masked", padding: Tensor | None = None
) -> Tensor:
    """Cut [B, H, W, C] into [B, windows, tokens, C]; `padding` [C] is a token of padding, zeros without it."""
    height, width = window[0], window[1]
    x = _pad(_roll(x, shift, -1), window, padding) if layout == "timm" else _roll(_pad(x, window, padding), shift, -1)
    batch, rows, columns, channels = x.shape
    down, across = rows // height, columns // width
    if layout == "grid":
        x = x.reshape(batch, height, down, width, across, channels).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.reshape(batch, down, height, across, width, channels).transpose(2, 3)
    return x.reshape(batch, down * across, height * width, channels)


def merge_windows(x: Tensor, size: list[int], window: list[int], shift: list[int], layout: str = "masked") -> Tensor:
    """The inverse of ``partition_windows``: [B, windows, tokens, C] -> [B, H, W, C], padding dropped."""
    height, width = window[0], window[1]
    rows = size[0] + window_padding(size[0], height)
    columns = size[1] + window_padding(size[1], width)
    batch, channels = x.shape[0], x.shape[3]
    x = x.reshape(batch, rows // height, columns // width, height, width, channels)
    x = x.permute(0, 3, 1, 4, 2, 5) if layout == "grid" else x.transpose(2, 3)
    x = x.reshape(batch, rows, columns, channels)
    if layout == "timm":
        return _roll(x[:, : size[0], : size[1]], shift, 1)
    return _roll(x, shift, 1)[:, : size[0], : size[1]]


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Region of every position along one axis of the padded and rolled map: 0 body, 1 and 2 the two parts that a shift
    brings together in the last window."""
    padded = size + window_padding(size, window)
    position = torch.arange(padded, device=device)
    if shift == 0:
        return torch.zeros_like(position)
    return (position >= padded - window).to(position.dtype) + (position >= padded - shift).to(position.dtype)


def padding_tokens(
    size: list[int], window: list[int], shift: list[int], device: torch.device, layout: str = "masked"
) -> Tensor | None:
    """Which tokens [windows, tokens] of windows are padding; None where windows divide the map."""
    if window_padding(size[0], window[0]) == 0 and window_padding(size[1], window[1]) == 0:
        return None
    is_real = torch.ones([1, size[0], size[1], 1], device=device)  # [1, H, W, 1]
    return partition_windows(is_real, window, shift, layout)[0, :, :, 0] == 0


def window_mask(
    size: list[int],
    window: list[int],
    shift: list[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "masked",
) -> Tensor | None:
    """Additive mask [windows, query, key] of attention scores: 0 where a query attends to a key. None if all do.

    A padding query attends to everything, as it is dropped afterwards: no row is without keys.
    """
    padding = padding_tokens(size, window, shift, device, layout) if layout == "masked" else None
    shifted = shift[0] > 0 or shift[1] > 0
    if layout == "grid" or (not shifted and padding is None):
        return None
    rows = _regions(size[0], window[0], shift[0], device)  # [H']
    columns = _regions(size[1], window[1], shift[1], device)  # [W']
    region = 3 * rows.unsqueeze(1) + columns.unsqueeze(0)  # [H', W']
    region = partition_windows(region[None, :, :, None], window, [0, 0])[0, :, :, 0]  # [windows, tokens]
    separated = region.unsqueeze(2) != region.unsqueeze(1)  # [windows, query, key]
    if padding is not None:
        separated = (separated | padding.unsqueeze(1)) & ~padding.unsqueeze(2)
    # -100 is what Swin's public implementations add; nothing is lower than -inf, whatever the bias
    score = float("-inf") if layout == "masked" else -100.0
    return torch.zeros(separated.shape, dtype=dtype, device=device).masked_fill(separated, score)


# --------------------------------------------------------------------------- windows larger than the map


def _places(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Along one axis, which tokens of a window have a token of the map, in their order: all, unless it is larger."""
    position = torch.arange(min(size, window), device=device)
    if window <= size:
        return position
    unmoved = max(size - shift, 0)  # the others went around
    return torch.where(position < unmoved, position, position - unmoved + (window - shift))


def fit_windows(
    size: list[int], window: list[int], shift: list[int], bias: Tensor | None
) -> tuple[list[int], list[int], Tensor | None]:
    """Window, shift and bias of the same attention where windows are not larger than the map, in the layout "masked".

    ``bias`` [heads, tokens, tokens] is that of the windows as they are, or already that of windows that fit.
    """
    fitting = [min(window[0], max(size[0], 1)), min(window[1], max(size[1], 1))]
    if fitting == window:
        return window, shift, bias
    if bias is not None and bias.shape[1] != fitting[0] * fitting[1]:
        rows = _places(size[0], window[0], shift[0], bias.device)
        columns = _places(size[1], window[1], shift[1], bias.device)
        tokens = (rows.unsqueeze(1) * window[1] + columns.unsqueeze(0)).flatten()  # [fitting tokens]
        bias = bias.index_select(1, tokens).index_select(2, tokens)
    # a shift by the whole map or more moves all of it
    return fitting, [shift[0] if shift[0] < fitting[0] else 0, shift[1] if shift[1] < fitting[1] else 0], bias


def check_windows(
    op: str, size: list[int], num_heads: int, channels: int, window: list[int], shift: list[int], bias: Tensor | None,
    x: Tensor, layout: str = "masked",
) -> tuple[list[int], list[int], Tensor | None]:  # fmt: skip
    """Check the arguments of windowed attention on maps x of ``size`` [H, W] and ``channels`` (InputError).

    Returns window, shift and bias: in the layout "masked" a window larger than the map is the map.
    """
    check_integer(op, "num_heads", num_heads, 1)
    for i in range(2):
        check_integer(op, "window", window[i], 1)
        check_integer(op, "shift", shift[i], 0)
    if channels == 0 or channels % (3 * num_heads) != 0:
        raise InputError(f"{op}: {channels} channels are not 3 * {num_heads} heads * head_dim")
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise InputError(f"{op}: shift must be from 0 to window - 1, got {shift} for windows {window}")
    fitting = [min(window[0], max(size[0], 1)), min(window[1], max(size[1], 1))]
    tokens, fitting_tokens = window[0] * window[1], fitting[0] * fitting[1]
    if layout != "masked" and tokens > 0x7FFFFFFF:  # where padding is attended, all of a window is there
        raise InputError(f"{op}: a window of {window} on a map of {size} is too large for the layout {layout}")
    if bias is not None and layout == "masked" and bias.dim() == 3 and bias.shape[1] == fitting_tokens:
        tokens = fitting_tokens
    check_operand(op, "bias", bias, [num_heads, tokens, tokens], x)
    return fit_windows(size, window, shift, bias) if layout == "masked" else (window, shift, bias)


def lowest_scores(bias: Tensor, qkv: Tensor) -> Tensor:
    """The lowest number of the bias' dtype, which masks, as that of float32, which scores are computed in: float16's is
    not low enough to hide the scores, and float64's would become -inf."""
    lowest = -3.4028234663852886e38
    if bias.dtype == torch.float16:
        return torch.where(bias == -65504.0, lowest, bias.to(torch.float32))
    if bias.dtype == torch.float64 and qkv.dtype != torch.float64:
        return torch.where(bias.isinf(), bias, bias.clamp(lowest, -lowest))
    return bias


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, windows, tokens, 3*heads*d] -> three times [B, windows, heads, tokens, d]."""
    batch, windows, tokens, channels = qkv.shape
    qkv = qkv.reshape(batch, windows, tokens, 3, num_heads, channels // (3 * num_heads)).permute(3, 0, 1, 4, 2, 5)
    return qkv[0], qkv[1], qkv[2]
