"""The layouts of window_attention and AttnScale, against their definitions and every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from stacked import needs_extension
from torch import Tensor

from asvit_fast import ops
from asvit_fast.backends import use_backend
from asvit_fast.ops.window_attention import window_attention_reference


def attention_by_loops(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], layout: str, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Position by position on the padded and rolled map. Returns the output and the mean of the values that the query
    may attend, both [B, H, W, heads, d]."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // heads
    token = torch.zeros(channels, dtype=qkv.dtype) if padding is None else padding
    rows, columns = (math.ceil(size / w) * w for size, w in zip((height, width), window, strict=True))

    def source(position: int, size: int, padded: int, s: int) -> int | None:
        """The token at a position; None for padding."""
        if layout == "timm":
            return (position + s) % size if position < size else None
        rolled = (position + s) % padded
        return rolled if rolled < size else None

    def group(position: int, count: int, w: int) -> int:
        return position % (count // w) if layout == "grid" else position // w

    def region(position: int, padded: int, w: int, s: int) -> int:
        return int(s > 0 and position >= padded - w) + int(s > 0 and position >= padded - s)

    grid = {}
    for i in range(rows):
        for j in range(columns):
            r, c = source(i, height, rows, shift[0]), source(j, width, columns, shift[1])
            values = token.expand(batch, channels) if r is None or c is None else qkv[:, r, c]
            where = (group(i, rows, window[0]), group(j, columns, window[1]))
            side = (region(i, rows, window[0], shift[0]), region(j, columns, window[1], shift[1]))
            grid[i, j] = (None if r is None or c is None else (r, c), where, side, values.unflatten(1, (3, heads, -1)))
    out = torch.zeros(batch, height, width, heads, head_dim, dtype=qkv.dtype)
    mean = torch.zeros_like(out)
    for place, where, side, values in grid.values():
        if place is None:
            continue
        others = [(s, v) for _, w, s, v in grid.values() if w == where]
        keys = torch.stack([v for _, v in others], 1)  # [B, n, 3, heads, d]
        scores = torch.einsum("bhd,bnhd->bhn", values[:, 0], keys[:, :, 1]) * head_dim**-0.5
        apart = torch.tensor([s != side for s, _ in others])
        weights = (scores + -100.0 * apart).softmax(-1)
        out[:, place[0], place[1]] = torch.einsum("bhn,bnhd->bhd", weights, keys[:, :, 2])
        mean[:, place[0], place[1]] = keys[:, ~apart, 2].mean(1)
    return out, mean


CASES = [
    # H, W, heads, head_dim, window, shift, layout
    (8, 8, 2, 4, (4, 4), (0, 0), "timm"),
    (8, 6, 2, 5, (4, 3), (2, 1), "torchvision"),
    (7, 9, 2, 3, (4, 4), (2, 2), "timm"),
    (7, 9, 2, 3, (4, 4), (2, 2), "torchvision"),
    (5, 4, 1, 8, (7, 7), (3, 0), "timm"),
    (5, 4, 3, 2, (7, 7), (0, 3), "torchvision"),
    (9, 5, 2, 4, (4, 3), (0, 0), "torchvision"),
    (8, 6, 2, 4, (4, 3), (0, 0), "grid"),
    (6, 6, 1, 1, (2, 3), (0, 0), "grid"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("path", ["default", "reference"])
def test_layouts(case: tuple, scaled: bool, path: str, poison_empty: None) -> None:
    height, width, heads, head_dim, window, shift, layout = case
    torch.manual_seed(0)
    qkv = torch.randn(2, height, width, 3 * heads * head_dim, dtype=torch.float64, requires_grad=True)
    inputs = [qkv]
    padding = attn_scale = None
    if layout != "grid":
        padding = torch.randn(qkv.shape[3], dtype=torch.float64, requires_grad=True)
        inputs.append(padding)
    expected, mean = attention_by_loops(qkv, heads, window, shift, layout, padding)
    if scaled:
        attn_scale = torch.randn(heads, dtype=torch.float64, requires_grad=True)
        inputs.append(attn_scale)
        factor = attn_scale[:, None]
        expected = (1 + factor) * expected - factor * mean
    expected = expected.flatten(3)
    arguments = {"layout": layout, "padding": padding, "attn_scale": attn_scale}
    if path == "reference":
        with use_backend("reference"):
            got = ops.window_attention(qkv, heads, window, shift, **arguments)
    else:
        got = ops.window_attention(qkv, heads, window, shift, **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True, materialize_grads=True)
    gradients = torch.autograd.grad(got, inputs, cotangent, allow_unused=True, materialize_grads=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-12)


def test_masked_attn_scale() -> None:
    """Padding and other regions count neither in the attention nor in the mean that AttnScale takes away."""
    qkv = torch.randn(2, 5, 7, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    got = ops.window_attention(qkv, 2, (3, 4), (1, 2), attn_scale=scale)
    flat = qkv.detach().clone()
    flat[..., :16] = 0.0  # no scores: the attention itself is uniform
    mean = ops.window_attention(flat, 2, (3, 4), (1, 2)).unflatten(3, (2, 4))
    attention = ops.window_attention(qkv, 2, (3, 4), (1, 2)).unflatten(3, (2, 4))
    torch.testing.assert_close(got.unflatten(3, (2, 4)), (1 + scale[:, None]) * attention - scale[:, None] * mean)
    torch.testing.assert_close(got[..., 4:], mean[..., 1, :])  # w = -1: nothing but the mean
    torch.autograd.gradcheck(lambda x, w: ops.window_attention(x, 2, (3, 4), (1, 2), attn_scale=w), (qkv[:1], scale))


def test_padding_is_zeros_by_default() -> None:
    qkv = torch.randn(1, 5, 4, 24, dtype=torch.float64)
    for layout in ("timm", "torchvision"):
        got = ops.window_attention(qkv, 2, (3, 3), (1, 1), layout=layout)
        zeros = torch.zeros(24, dtype=torch.float64)
        torch.testing.assert_close(got, ops.window_attention(qkv, 2, (3, 3), (1, 1), layout=layout, padding=zeros))


@needs_extension
def test_half_precision() -> None:
    qkv = torch.randn(2, 10, 9, 3 * 4 * 8, dtype=torch.float64)
    padding, scale = torch.randn(96, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    exact = window_attention_reference(qkv, 4, [7, 7], [3, 3], layout="timm", padding=padding, attn_scale=scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = [x.to(dtype) for x in (qkv, padding, scale)]
        got = ops.window_attention(low[0], 4, (7, 7), (3, 3), layout="timm", padding=low[1], attn_scale=low[2])
        eager = window_attention_reference(low[0], 4, [7, 7], [3, 3], layout="timm", padding=low[1], attn_scale=low[2])
        assert got.dtype == dtype
        assert (got - exact).abs().max() < 2 * (eager - exact).abs().max() + 1e-6


def test_dropout_keeps_the_layout() -> None:
    qkv = torch.randn(2, 5, 7, 24)
    padding = torch.randn(24)
    torch.manual_seed(0)
    got = ops.window_attention(qkv, 2, (3, 4), (1, 2), dropout=1e-7, layout="torchvision", padding=padding)
    torch.testing.assert_close(got, ops.window_attention(qkv, 2, (3, 4), (1, 2), layout="torchvision", padding=padding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "swin"}, "layout must be masked, timm, torchvision or grid, got swin"),
        ({"layout": "grid", "shift": (1, 0)}, "no shift"),
        ({"layout": "grid", "window": (4, 3)}, "divide"),
        ({"padding": torch.zeros(24)}, "nobody attends padding"),
        ({"layout": "timm", "padding": torch.zeros(8)}, r"\[24\]"),
        ({"attn_scale": torch.zeros(3)}, r"\[2\], one number per head"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    settings = {"window": (3, 3)} | arguments
    with pytest.raises(ValueError, match=message):
        ops.window_attention(torch.zeros(1, 6, 6, 24), 2, **settings)


def test_compile_and_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    qkv = torch.randn(2, 5, 7, 24, requires_grad=True)
    padding, scale = torch.randn(24, requires_grad=True), torch.randn(2, requires_grad=True)

    def f(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return F.gelu(ops.window_attention(x, 2, (3, 4), (1, 2), layout="timm", padding=p, attn_scale=w))

    expected = torch.autograd.grad(f(qkv, padding, scale).square().sum(), (qkv, padding, scale))
    for other in (torch.compile(f, fullgraph=True), lambda *x: checkpoint(f, *x, use_reentrant=False)):
        got = torch.autograd.grad(other(qkv, padding, scale).square().sum(), (qkv, padding, scale))
        torch.testing.assert_close(got, expected)
