"""Cutting a channels-last map of two or three axes into windows, and which tokens attend each other, by layout.

- "masked": zeros are appended until windows cover the map, which is then rolled. Padding is masked out, and tokens
  that only the roll brings together do not attend to each other.
- "timm", "torchvision": as Swin's public implementations do it. Padding is attended like any token, and its projection
  is a vector of its own; tokens that only the roll brings together get -100 on their score. timm rolls the map and pads
  it then, torchvision pads first: on a map that windows divide they are the same.
- "grid": the tokens of a window are spread evenly over the map (the grid attention of MaxViT, arXiv 2204.01697, section
  3.2). Windows divide the map, nothing is rolled.

``size``, ``window``, ``shift`` and ``kv_window`` have a number for each axis of the map: (rows, columns), or
(depth, rows, columns). Keys and values may come from larger windows around those of the queries, ``kv_window``, which
overlap then (the overlapping cross-attention of HAT, arXiv 2205.04437, section 3.2); None: from the same ones.

torch.jit.script compiles this file.
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


def token_count(window: list[int]) -> int:
    """Tokens of a window."""
    count = 1
    for length in window:
        count *= length
    return count


def _pad(x: Tensor, before: list[int], after: list[int], padding: Tensor | None) -> Tensor:
    """[B, *size, C] with that many tokens more along each axis: zeros, or `padding` [C]."""
    axes = len(before)
    amounts = [0, 0]
    for axis in range(axes - 1, -1, -1):
        amounts += [before[axis], after[axis]]
    if max(amounts) == 0:
        return x
    size = x.shape[1 : 1 + axes]
    x = F.pad(x, amounts)
    if padding is None:
        return x
    appended = torch.zeros([1] * axes, dtype=torch.bool, device=x.device)
    for axis in range(axes):
        position = torch.arange(x.shape[1 + axis], device=x.device)
        outside = (position < before[axis]) | (position >= before[axis] + size[axis])
        shape = [1] * axes
        shape[axis] = -1
        appended = appended | outside.reshape(shape)  # [*size]
    return torch.where(appended.unsqueeze(-1), padding.to(x.dtype), x)


def _pad_to_windows(x: Tensor, window: list[int], padding: Tensor | None) -> Tensor:
    """[B, *size, C], continued until windows cover it."""
    return _pad(x, [0] * len(window), [window_padding(x.shape[1 + i], w) for i, w in enumerate(window)], padding)


def _roll(x: Tensor, shift: list[int], sign: int) -> Tensor:
    if max(shift) == 0:
        return x
    return torch.roll(x, shifts=[sign * s for s in shift], dims=[1 + axis for axis in range(len(shift))])


def partition_windows(
    x: Tensor, window: list[int], shift: list[int], layout: str = "masked", padding: Tensor | None = None
) -> Tensor:
    """Cut [B, *size, C] into [B, windows, tokens, C]; `padding` [C] is a token of padding, zeros without it."""
    if layout == "timm":
        x = _pad_to_windows(_roll(x, shift, -1), window, padding)
    else:
        x = _roll(_pad_to_windows(x, window, padding), shift, -1)
    shape, of_windows, of_tokens = [x.shape[0]], [0], [0] * 0  # of_*: the axes of windows and of their tokens
    for axis, length in enumerate(window):
        count = x.shape[1 + axis] // length
        if layout == "grid":
            shape += [length, count]
            of_tokens.append(1 + 2 * axis)
            of_windows.append(2 + 2 * axis)
        else:
            shape += [count, length]
            of_windows.append(1 + 2 * axis)
            of_tokens.append(2 + 2 * axis)
    shape.append(x.shape[-1])
    of_tokens.append(len(shape) - 1)
    x = x.reshape(shape).permute(of_windows + of_tokens)  # [B, *windows, *window, C]
    return x.flatten(1, len(window)).flatten(2, -2)


def partition_key_windows(x: Tensor, window: list[int], kv_window: list[int], padding: Tensor | None = None) -> Tensor:
    """The windows of ``kv_window`` tokens around those of ``window``: [B, *size, C] -> [B, windows, keys, C]."""
    before, after, axes = [0] * 0, [0] * 0, len(window)
    for axis, length in enumerate(window):
        margin = (kv_window[axis] - length) // 2
        before.append(margin)
        after.append(window_padding(x.shape[1 + axis], length) + kv_window[axis] - length - margin)
    x = _pad(x, before, after, padding)
    for axis, length in enumerate(window):
        x = x.unfold(1 + axis, kv_window[axis], length)
    x = x.movedim(1 + axes, -1)  # [B, *windows, *kv_window, C]
    return x.flatten(1, axes).flatten(2, -2)


def fold_key_windows(x: Tensor, size: list[int], window: list[int], kv_window: list[int]) -> Tensor:
    """The adjoint of ``partition_key_windows``, sums over the windows that a token is in: [B, windows, keys, C] ->
    [B, *size, C]."""
    axes = len(window)
    counts = [(n + window_padding(n, length)) // length for n, length in zip(size, window, strict=True)]
    x = x.reshape([x.shape[0], *counts, *kv_window, x.shape[-1]])
    for axis, length in enumerate(window):
        x = x.movedim(1 + axes, 2 + axis)  # [B, sizes so far, windows, keys, windows and keys of the others, C]
        x = _overlap_add(x, 1 + axis, length).narrow(1 + axis, (kv_window[axis] - length) // 2, size[axis])
    return x


def _overlap_add(x: Tensor, axis: int, length: int) -> Tensor:
    """Sums of windows that begin `length` tokens apart: `axis` (windows) and the next (their tokens) become one."""
    windows, keys = x.shape[axis], x.shape[axis + 1]
    steps = -(-keys // length)
    x = F.pad(x, [0, 0] * (x.dim() - axis - 2) + [0, steps * length - keys])
    shape = list(x.shape)
    shape[axis], shape[axis + 1] = windows + steps - 1, length
    total = x.new_zeros(shape)
    for step, part in enumerate(x.split(length, axis + 1)):
        total.narrow(axis, step, windows).add_(part)
    return total.flatten(axis, axis + 1)


def merge_windows(x: Tensor, size: list[int], window: list[int], shift: list[int], layout: str = "masked") -> Tensor:
    """The inverse of ``partition_windows``: [B, windows, tokens, C] -> [B, *size, C], padding dropped."""
    counts, padded, order, axes = [x.shape[0]], [x.shape[0]], [0], len(window)
    for axis, length in enumerate(window):
        padded.append(size[axis] + window_padding(size[axis], length))
        counts.append(padded[-1] // length)
        order += [1 + axes + axis, 1 + axis] if layout == "grid" else [1 + axis, 1 + axes + axis]
    counts += window
    counts.append(x.shape[-1])
    padded.append(x.shape[-1])
    order.append(1 + 2 * axes)
    x = x.reshape(counts).permute(order).reshape(padded)
    if layout != "timm":
        x = _roll(x, shift, 1)
    for axis in range(axes):
        x = x.narrow(1 + axis, 0, size[axis])
    return _roll(x, shift, 1) if layout == "timm" else x


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
    rest = 0
    for axis, length in enumerate(window):
        rest += window_padding(size[axis], length)
    if rest == 0:
        return None
    is_real = torch.ones(size, device=device).unsqueeze(0).unsqueeze(-1)  # [1, *size, 1]
    return partition_windows(is_real, window, shift, layout)[0, :, :, 0] == 0


def window_mask(
    size: list[int],
    window: list[int],
    shift: list[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "masked",
    kv_window: list[int] | None = None,
) -> Tensor | None:
    """Additive mask [windows, query, key] of attention scores: 0 where a query attends to a key. None if all do.

    A padding query attends to everything, as it is dropped afterwards: no row is without keys.
    """
    if kv_window is not None and layout != "masked":
        return None
    padding = padding_tokens(size, window, shift, device, layout) if layout == "masked" else None
    if kv_window is not None:
        is_real = torch.ones(size, device=device).unsqueeze(0).unsqueeze(-1)  # [1, *size, 1]
        is_key = partition_key_windows(is_real, window, kv_window)[0, :, :, 0] > 0  # [windows, keys]
        separated = ~is_key.unsqueeze(1)  # [windows, 1, key]
        separated = (
            separated.expand(-1, token_count(window), -1) if padding is None else separated & ~padding.unsqueeze(2)
        )
    else:
        if layout == "grid" or (max(shift) == 0 and padding is None):
            return None
        axes = len(window)
        region = torch.zeros([1] * axes, dtype=torch.int64, device=device)
        for axis, length in enumerate(window):
            shape = [1] * axes
            shape[axis] = -1
            region = 3 * region + _regions(size[axis], length, shift[axis], device).reshape(shape)  # [*padded size]
        region = partition_windows(region.unsqueeze(0).unsqueeze(-1), window, [0] * axes)[
            0, :, :, 0
        ]  # [windows, tokens]
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
    fitting = [min(length, max(size[axis], 1)) for axis, length in enumerate(window)]
    if bias is None and max(shift) == 0:  # no comparison that torch.compile would compile again for
        return fitting, shift, None
    if fitting == window:
        return window, shift, bias
    if bias is not None and bias.shape[1] != token_count(fitting):
        tokens = torch.zeros([1], dtype=torch.int64, device=bias.device)
        for axis, length in enumerate(window):
            places = _places(size[axis], length, shift[axis], bias.device)
            tokens = (tokens.unsqueeze(1) * length + places).flatten()  # [fitting tokens so far]
        bias = bias.index_select(1, tokens).index_select(2, tokens)
    # a shift by the whole map or more moves all of it
    return fitting, [s if s < fitting[axis] else 0 for axis, s in enumerate(shift)], bias


def check_channels(op: str, channels: int, num_heads: int, parts: int) -> None:
    """InputError unless the channels of a map are `parts` times num_heads * head_dim."""
    check_integer(op, "num_heads", num_heads, 1)
    if channels == 0 or channels % (parts * num_heads) != 0:
        raise InputError(f"{op}: {channels} channels are not {'3 * ' * (parts == 3)}{num_heads} heads * head_dim")


def check_windows(
    op: str, size: list[int], num_heads: int, window: list[int], shift: list[int], bias: Tensor | None,
    x: Tensor, layout: str = "masked", kv_window: list[int] | None = None,
) -> tuple[list[int], list[int], Tensor | None]:  # fmt: skip
    """Check the arguments of windowed attention on maps x of ``size`` (InputError).

    Returns window, shift and bias: in the layout "masked" a window larger than the map is the map.
    """
    for length, moved in zip(window, shift, strict=True):
        check_integer(op, "window", length, 1)
        check_integer(op, "shift", moved, 0)
    if any(s >= w for s, w in zip(shift, window, strict=True)):
        raise InputError(f"{op}: shift must be from 0 to window - 1, got {shift} for windows {window}")
    fits = layout == "masked" and kv_window is None
    fitting = [min(w, max(n, 1)) for w, n in zip(window, size, strict=True)]
    tokens, keys = token_count(window), token_count(kv_window or window)
    if not fits and max(tokens, keys) > 0x7FFFFFFF:  # where padding is attended, all of a window is there
        raise InputError(
            f"{op}: a window of {kv_window or window} on a map of {size} is too large for the layout {layout}"
        )
    if isinstance(bias, Tensor) and fits and bias.dim() == 3 and bias.shape[1] == token_count(fitting):
        tokens = keys = token_count(fitting)
    check_operand(op, "bias", bias, [num_heads, tokens, keys], x)
    return fit_windows(size, window, shift, bias) if fits else (window, shift, bias)


def check_kv_window(op: str, window: list[int], shift: list[int], kv_window: list[int], layout: str) -> None:
    """InputError unless windows of keys can lie around those of queries."""
    for axis, length in enumerate(kv_window):
        check_integer(op, "kv_window", length, 1)
        if length < window[axis] or (length - window[axis]) % 2 != 0:
            raise InputError(
                f"{op}: kv_window must be larger than window by an even number of tokens, as many on either side, got "
                f"{kv_window} around {window}"
            )
    if max(shift) > 0 or layout == "grid":
        raise InputError(f"{op}: with kv_window there is no shift and no layout grid, got {shift} and {layout}")


def lowest_scores(bias: Tensor, qkv: Tensor) -> Tensor:
    """The lowest number of the bias' dtype, which masks, as that of float32, which scores are computed in: float16's is
    not low enough to hide the scores, and float64's would become -inf."""
    lowest = -3.4028234663852886e38
    if bias.dtype == torch.float16:
        return torch.where(bias == -65504.0, lowest, bias.to(torch.float32))
    if bias.dtype == torch.float64 and qkv.dtype != torch.float64:
        return torch.where(bias.isinf(), bias, bias.clamp(lowest, -lowest))
    return bias


# --------------------------------------------------------------------------- heads


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, windows, tokens, 3*heads*d] -> three times [B, windows, heads, tokens, d]."""
    batch, windows, tokens, channels = qkv.shape
    qkv = qkv.reshape(batch, windows, tokens, 3, num_heads, channels // (3 * num_heads)).permute(3, 0, 1, 4, 2, 5)
    return qkv[0], qkv[1], qkv[2]


def window_projections(
    projections: list[Tensor], num_heads: int, window: list[int], shift: list[int], layout: str,
    padding: Tensor | None, kv_window: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v of every window, [B, windows, heads, tokens, d], from the fused map [B, *size, 3*heads*d] or the three
    maps [B, *size, heads*d]."""
    if len(projections) == 1 and kv_window is None:
        return split_heads(partition_windows(projections[0], window, shift, layout, padding), num_heads)
    if len(projections) == 1:
        projections = list(projections[0].chunk(3, -1))
    found = [torch.empty(0)] * 0
    for i in range(3):
        token = None if padding is None else padding.chunk(3)[i]
        if i > 0 and kv_window is not None:
            x = partition_key_windows(projections[i], window, kv_window, token)
        else:
            x = partition_windows(projections[i], window, shift, layout, token)
        found.append(x.unflatten(3, [num_heads, x.shape[3] // num_heads]).transpose(2, 3))
    return found[0], found[1], found[2]
