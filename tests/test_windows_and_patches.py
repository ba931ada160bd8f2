"""window_attention, patch_embed and patch_merge against loops written from their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import asvit_fast as af
from asvit_fast import ops
from asvit_fast.backends import use_backend
from asvit_fast.nn.patch_embed import embed_patches


def attention_by_loops(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Token by token: who sits in whose window after the padded map is rolled, and came from the same side of the
    seam."""
    batch, height, width, channels = qkv.shape
    head_dim = channels // 3 // heads
    rows, columns = math.ceil(height / window[0]) * window[0], math.ceil(width / window[1]) * window[1]
    out = torch.zeros(batch, height, width, heads * head_dim, dtype=qkv.dtype)

    def place(i: int, size: int, w: int, s: int) -> tuple[int, int, bool]:
        """Window, position in the window, and whether the shift wrapped the token around."""
        rolled = (i - s) % size
        return rolled // w, rolled % w, i - s < 0

    places = {
        (i, j): (place(i, rows, window[0], shift[0]), place(j, columns, window[1], shift[1]))
        for i in range(height)
        for j in range(width)
    }
    for (i, j), (a, b) in places.items():
        group = [
            (k, m)
            for (k, m), (c, d) in places.items()
            if c[0] == a[0] and d[0] == b[0] and c[2] == a[2] and d[2] == b[2]
        ]
        keys = torch.stack([qkv[:, k, m] for k, m in group], 1).unflatten(
            2, (3, heads, head_dim)
        )  # [B, n, 3, heads, d]
        query = qkv[:, i, j].unflatten(1, (3, heads, head_dim))[:, 0]  # [B, heads, d]
        scores = torch.einsum("bhd,bnhd->bhn", query, keys[:, :, 1]) * head_dim**-0.5
        if bias is not None:
            row = a[1] * window[1] + b[1]
            column = [places[key][0][1] * window[1] + places[key][1][1] for key in group]
            scores = scores + bias[:, row][:, column]
        out[:, i, j] = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), keys[:, :, 2]).flatten(1)
    return out


CASES = [
    # H, W, heads, head_dim, window, shift, with bias
    (8, 8, 2, 4, (4, 4), (0, 0), False),
    (6, 8, 1, 1, (3, 4), (0, 0), True),
    (7, 5, 3, 3, (4, 3), (0, 0), False),
    (8, 6, 2, 5, (4, 3), (2, 1), True),
    (7, 9, 2, 2, (4, 4), (2, 2), True),
    (5, 5, 1, 8, (7, 7), (3, 3), False),
    (1, 1, 2, 3, (1, 1), (0, 0), True),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["default", "reference"])
def test_window_attention(case: tuple, path: str, poison_empty: None) -> None:
    height, width, heads, head_dim, window, shift, with_bias = case
    torch.manual_seed(0)
    qkv = torch.randn(2, height, width, 3 * heads * head_dim, dtype=torch.float64, requires_grad=True)
    tokens = window[0] * window[1]
    bias = torch.randn(heads, tokens, tokens, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [qkv] if bias is None else [qkv, bias]
    expected = attention_by_loops(qkv, heads, window, shift, bias)
    if path == "reference":
        with use_backend("reference"):
            got = ops.window_attention(qkv, heads, window, shift, bias)
    else:
        got = ops.window_attention(qkv, heads, window, shift, bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for gradient, want in zip(torch.autograd.grad(got, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_window_attention_precision(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 14, 14, 3 * 4 * 8, dtype=torch.float64)
    exact = ops.window_attention(qkv, 4, (7, 7), (3, 3))
    got = ops.window_attention(qkv.to(dtype), 4, (7, 7), (3, 3))
    with use_backend("reference"):
        eager = ops.window_attention(qkv.to(dtype), 4, (7, 7), (3, 3))
    assert got.dtype == dtype
    assert (got - exact).abs().max() < 2 * (eager - exact).abs().max() + 1e-6


def test_window_attention_layouts_and_scale() -> None:
    qkv = torch.randn(2, 48, 6, 8, dtype=torch.float64).permute(0, 2, 3, 1)  # [2, 6, 8, 48], channels far apart
    torch.testing.assert_close(ops.window_attention(qkv, 2, (3, 4)), ops.window_attention(qkv.contiguous(), 2, (3, 4)))
    scaled = qkv.clone()
    scaled[..., :16] *= 0.5 / 8**-0.5
    torch.testing.assert_close(ops.window_attention(qkv, 2, (3, 4), scale=0.5), ops.window_attention(scaled, 2, (3, 4)))
    assert ops.window_attention(torch.zeros(0, 6, 8, 48), 2, (3, 4)).shape == (0, 6, 8, 16)


def test_window_attention_transforms() -> None:
    qkv = torch.randn(1, 5, 4, 12, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return ops.window_attention(x, 2, (3, 2), (1, 0)).square().sum()

    torch.autograd.gradcheck(lambda x: ops.window_attention(x, 2, (3, 2), (1, 0)), (qkv.clone().requires_grad_(),))
    gradient = torch.func.grad(f)(qkv)
    leaf = qkv.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(f(leaf), leaf)[0], gradient)
    torch.testing.assert_close(torch.vmap(torch.func.grad(f))(torch.stack([qkv, 2 * qkv]))[0], gradient)
    tangent = torch.randn_like(qkv)
    directional = torch.func.jvp(f, (qkv,), (tangent,))[1]
    torch.testing.assert_close(directional, (gradient * tangent).sum())
    second = torch.func.jvp(torch.func.grad(f), (qkv,), (tangent,))[1]
    torch.testing.assert_close(
        (torch.func.hessian(f)(qkv).flatten().reshape(qkv.numel(), -1) @ tangent.flatten()), second.flatten()
    )
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], gradient)
    with use_backend("reference"):
        torch.autograd.gradgradcheck(f, (leaf,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(2, 4, 12), 2, (2, 2)), "must be"),
        ((torch.zeros(1, 4, 4, 10), 2, (2, 2)), "10 channels"),
        ((torch.zeros(1, 4, 4, 12), 2, (0, 2)), "window must be positive"),
        ((torch.zeros(1, 4, 4, 12), 2, (2, 2), (2, 0)), "shift must be from 0"),
        ((torch.zeros(1, 4, 4, 12), 2, (2, 2), (0, 0), torch.zeros(2, 3, 4)), "bias must be"),
    ],
)
def test_window_attention_rejects(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ops.window_attention(*arguments)


def test_forced_backend_gives_its_reason() -> None:
    with use_backend("cuda"), pytest.raises(af.InputError, match="cannot run window_attention"):
        ops.window_attention(torch.zeros(1, 4, 4, 12), 2, (2, 2))


@pytest.mark.parametrize("kernel", [4, 5, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(4, 1), (8, 2), (16, 5)])
@pytest.mark.parametrize("size", [(32, 32), (35, 50)])
def test_patch_embed(kernel: int, stride: int, dilation: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(6, 3, kernel, kernel, dtype=torch.float64)
    bias, gain, offset = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    out = embed_patches(image, weight, bias, stride, dilation, gain, offset, 1e-5)
    rows, columns = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
    assert out.shape == (2, rows, columns, 6)
    before = max(dilation * (kernel - 1) + 1 - stride, 0) // 2
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 0)):
        value = bias.expand(2, 6).clone()
        for ky in range(kernel):
            for kx in range(kernel):
                y, x = row * stride - before + ky * dilation, column * stride - before + kx * dilation
                if 0 <= y < size[0] and 0 <= x < size[1]:
                    value += image[:, :, y, x] @ weight[:, :, ky, kx].T
        torch.testing.assert_close(out[:, row, column], F.layer_norm(value, (6,), gain, offset), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("size", [(4, 6), (7, 5), (1, 1)])
@pytest.mark.parametrize("norm", [True, False])
def test_patch_merge(kernel: int, size: tuple[int, int], norm: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    features = 3 * kernel * kernel
    weight = torch.randn(5, features, dtype=torch.float64)
    gain, offset = (torch.randn(features, dtype=torch.float64) if norm else None for _ in range(2))
    out = ops.patch_merge(x, weight, kernel, 2, gain, offset)
    rows, columns = math.ceil(size[0] / 2), math.ceil(size[1] / 2)
    assert out.shape == (2, rows, columns, 5)
    before = (kernel - 2) // 2
    for row in range(rows):
        for column in range(columns):
            patch = torch.zeros(
                2, 3, kernel, kernel, dtype=torch.float64
            )  # channel-major, as nn.Unfold orders features
            for ky in range(kernel):
                for kx in range(kernel):
                    i, j = 2 * row - before + ky, 2 * column - before + kx
                    if 0 <= i < size[0] and 0 <= j < size[1]:
                        patch[:, :, ky, kx] = x[:, i, j]
            value = patch.flatten(1)
            value = F.layer_norm(value, (features,), gain, offset) if norm else value
            torch.testing.assert_close(out[:, row, column], value @ weight.T, rtol=1e-11, atol=1e-12)


def test_patches_reject_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="same Cin"):
        ops.patch_embed(torch.zeros(1, 4, 8, 8), torch.zeros(2, 3, 4, 4), None, 4, 1, (0, 0, 0, 0))
    with pytest.raises(ValueError, match="patch_merge: x must be"):
        ops.patch_merge(torch.zeros(1, 4, 4, 3), torch.zeros(2, 11), 2, 2)
