"""The layouts of window_attention and AttnScale, against their definitions and every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import TINY, assert_accurate
from stacked import every_isa, needs_extension
from torch import Tensor

from asvit_fast import ops
from asvit_fast.backends import use_backend


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


def both_ways(case: tuple, tensors: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors."""
    _, _, heads, _, window, shift, layout = case
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = ops.window_attention(num_heads=heads, window=window, shift=shift, layout=layout, **leaves)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


def random_tensors(case: tuple) -> dict[str, Tensor]:
    """qkv, bias, attn_scale, and padding where it is attended."""
    height, width, heads, head_dim, window, _, layout = case
    tokens = window[0] * window[1]
    tensors = {"qkv": torch.randn(2, height, width, 3 * heads * head_dim), "bias": torch.randn(heads, tokens, tokens)}
    tensors["attn_scale"] = torch.randn(heads)
    if layout in ("timm", "torchvision"):
        tensors["padding"] = torch.randn(3 * heads * head_dim)
    return tensors


LARGER = [  # several vectors, groups and tiles; heads narrower and wider than a vector
    (10, 9, 4, 8, (7, 7), (3, 3), "timm"),
    (10, 9, 2, 32, (7, 7), (3, 0), "torchvision"),
    (12, 9, 3, 5, (6, 9), (0, 4), "torchvision"),
    (20, 17, 1, 13, (12, 12), (6, 6), "timm"),
    (20, 20, 2, 22, (10, 10), (0, 0), "grid"),
    (9, 14, 2, 32, (7, 7), (3, 3), "masked"),
    (18, 18, 1, 8, (18, 18), (5, 0), "masked"),
]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("case", LARGER, ids=lambda case: f"{case[-1]}-{case[0]}x{case[1]}x{case[2]}x{case[3]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_isa(isa: str, case: tuple, dtype: torch.dtype) -> None:
    """error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64: forward and all gradients."""
    torch.manual_seed(1)
    tensors = {name: x.to(dtype) for name, x in random_tensors(case).items()}
    cotangent = torch.randn(2, case[0], case[1], case[2] * case[3]).to(dtype)
    ours = both_ways(case, tensors, cotangent)
    with use_backend("reference"):
        theirs = both_ways(case, tensors, cotangent)
        exact = both_ways(case, {name: x.double() for name, x in tensors.items()}, cotangent.double())
    for name, want in exact.items():
        assert ours[name].dtype == dtype
        # a sum over the map, of which there are few to compare
        tiny = 10 * TINY[dtype] if name == "attn_scale" else TINY[dtype]
        assert_accurate(name, ours[name], theirs[name], want, tiny)


@needs_extension
def test_threads_agree() -> None:
    """Bit for bit, the gradients of parameters too."""
    torch.manual_seed(5)
    case = (24, 17, 4, 8, (7, 7), (3, 3), "timm")
    tensors, cotangent = random_tensors(case), torch.randn(2, 24, 17, 32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(both_ways(case, tensors, cotangent))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_extension
def test_strides_and_mixed_types() -> None:
    """Channels far apart in memory; half precision with parameters in float32, whose gradients are float32."""
    case = (10, 9, 2, 4, (4, 4), (2, 1), "torchvision")
    tensors, cotangent = random_tensors(case), torch.randn(2, 10, 9, 8)
    expected = both_ways(case, tensors, cotangent)
    tensors["qkv"] = tensors["qkv"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    got = both_ways(case, tensors, cotangent.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0))
    assert all(torch.equal(got[name], expected[name]) for name in got)
    tensors["qkv"] = tensors["qkv"].bfloat16()
    got = both_ways(case, tensors, cotangent)
    assert {name: x.dtype for name, x in got.items() if x.dtype != torch.float32} == {
        "output": torch.bfloat16,
        "qkv": torch.bfloat16,
    }
    for name, want in expected.items():
        torch.testing.assert_close(got[name].float(), want, rtol=0.05, atol=0.2)


@needs_extension
def test_empty() -> None:
    case = (10, 9, 2, 4, (4, 4), (2, 1), "timm")
    tensors = random_tensors(case)
    tensors["qkv"] = tensors["qkv"][:0]
    got = both_ways(case, tensors, torch.randn(0, 10, 9, 8))
    assert got["output"].shape == (0, 10, 9, 8) and got["qkv"].shape == (0, 10, 9, 24)
    assert all(not got[name].any() for name in ("bias", "attn_scale", "padding"))


@needs_extension
@pytest.mark.parametrize("layout", ["masked", "timm", "torchvision", "grid"])
def test_opcheck(layout: str) -> None:
    case = (6, 4, 2, 2, (3, 2), (0, 0) if layout == "grid" else (1, 0), layout)
    tensors = {name: x.requires_grad_() for name, x in random_tensors(case).items()}
    parameters = [tensors.get(name) for name in ("bias", "padding", "attn_scale")]
    settings = (None, None, *parameters, None, 2, [3, 2], list(case[5]), [3, 2], 0.7, layout, 0.0)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.asvit_fast.window_attention.default, (tensors["qkv"], *settings))
    out, statistics = torch.ops.asvit_fast.window_attention(tensors["qkv"], *settings)
    arguments = (torch.randn_like(out), out.detach(), statistics.detach(), tensors["qkv"], *settings)
    wanted = [True, False, False, *(parameter is not None for parameter in parameters), False]
    operation = torch.ops.asvit_fast.window_attention_gradients.default
    torch.library.opcheck(operation, (*arguments, wanted), test_utils=utilities)
    only_bias = [False] * 3 + [wanted[3]] + [False] * 3
    torch.library.opcheck(operation, (*arguments, only_bias), test_utils=utilities)


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
        ({"padding": torch.zeros(24)}, "padding is masked out"),
        ({"layout": "timm", "padding": torch.zeros(8)}, r"\[24\]"),
        ({"attn_scale": torch.zeros(3)}, r"attn_scale must be \[2\], got \[3\]"),
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
