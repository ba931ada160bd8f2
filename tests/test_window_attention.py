"""window_attention against loops written from its definition, and against torch's attention, forward and backward."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from stacked import every_isa, needs_extension
from torch import Tensor

import asvit_fast as af
from asvit_fast import backends, ops
from asvit_fast.backends import use_backend
from asvit_fast.cost import peak_allocation


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
    for backend in ("cpu", "reference"):
        with use_backend(backend):
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


def test_dropout() -> None:
    qkv = torch.randn(1, 8, 8, 48)
    torch.manual_seed(0)
    dropped = ops.window_attention(qkv, 2, (4, 4), dropout=0.5)
    assert not torch.allclose(dropped, ops.window_attention(qkv, 2, (4, 4)))
    with use_backend("cpu"), pytest.raises(af.InputError, match=r"it has no dropout, got 0\.5"):
        ops.window_attention(qkv, 2, (4, 4), dropout=0.5)


def test_dropout_with_attn_scale_warns_that_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly and compiled; in evaluation and by wish of the caller nothing is said."""
    monkeypatch.delenv("ASVIT_FAST_STRICT", raising=False)
    monkeypatch.setattr(backends, "_notified", set())
    qkv, scale = torch.randn(1, 8, 8, 48), torch.randn(2)
    compiled = torch.compile(ops.window_attention, fullgraph=True, backend="eager")
    for attention in (ops.window_attention, compiled):
        backends._notified.clear()
        with pytest.warns(backends.FallbackWarning, match="AttnScale with attention dropout has no kernel") as said:
            dropped = [attention(qkv, 2, (4, 4), dropout=0.5, attn_scale=scale) for _ in range(2)][-1]
        assert len(said) == 1 and not torch.allclose(dropped, ops.window_attention(qkv, 2, (4, 4), attn_scale=scale))
    monkeypatch.setenv("ASVIT_FAST_STRICT", "1")
    with pytest.raises(backends.FallbackWarning):
        ops.window_attention(qkv, 2, (4, 4), dropout=0.5, attn_scale=scale)
    with use_backend("reference"):
        ops.window_attention(qkv, 2, (4, 4), dropout=0.5, attn_scale=scale)


def both_ways(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None, gradient: Tensor
) -> list[Tensor]:
    """Output, and gradients of qkv and bias."""
    inputs = [x.detach().requires_grad_() for x in (qkv, bias) if x is not None]
    out = ops.window_attention(inputs[0], heads, window, shift, *inputs[1:])
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def assert_as_exact(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None, tiny: float = 0.0
) -> None:
    """Forward and all gradients: error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64."""
    gradient = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, dtype=torch.float64)
    ours = both_ways(qkv, heads, window, shift, bias, gradient)
    with use_backend("reference"):
        theirs = both_ways(qkv, heads, window, shift, bias, gradient)
        wide = None if bias is None else bias.double()
        exact = both_ways(qkv.double(), heads, window, shift, wide, gradient.to(qkv.dtype).double())
    for name, got, other, want in zip(("output", "qkv", "bias"), ours, theirs, exact, strict=False):
        assert got.dtype == qkv.dtype
        assert_accurate(name, got, other, want, tiny)


SHAPES = [  # H, W, heads, head_dim, window, shift: one and many vectors and tiles, cut windows, every remainder
    (14, 14, 2, 8, (14, 14), (0, 0)),
    (7, 7, 3, 32, (7, 7), (0, 0)),
    (9, 14, 2, 5, (7, 7), (3, 3)),
    (17, 5, 1, 13, (17, 5), (4, 2)),
    (33, 2, 1, 45, (33, 2), (0, 0)),
    (28, 28, 1, 4, (28, 28), (0, 0)),
    (3, 3, 2, 1, (2, 2), (1, 1)),
    (12, 12, 2, 22, (12, 12), (5, 0)),
    (7, 7, 2, 8, (7, 7), (3, 3)),  # heads so narrow that queries share vectors, and do not fill the last
    (13, 6, 1, 7, (13, 6), (0, 0)),
    (7, 7, 2, 3, (7, 7), (0, 0)),
    (5, 7, 2, 2, (5, 7), (0, 0)),
]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:4])))
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_isa(isa: str, shape: tuple, dtype: torch.dtype, with_bias: bool) -> None:
    height, width, heads, head_dim, window, shift = shape
    torch.manual_seed(1)
    qkv = torch.randn(2, height, width, 3 * heads * head_dim).to(dtype)
    tokens = window[0] * window[1]
    bias = torch.randn(heads, tokens, tokens).to(dtype) if with_bias else None
    assert_as_exact(qkv, heads, window, shift, bias)


@needs_extension
def test_large_scores() -> None:
    """Scores of several thousand, ties and rows with a single weight of any size."""
    torch.manual_seed(2)
    qkv = torch.randn(2, 7, 7, 3 * 2 * 8)
    qkv[..., :32] *= 30.0
    assert_as_exact(qkv, 2, (7, 7), (0, 0), None, 1e-6)
    assert_as_exact(torch.zeros(1, 7, 7, 48), 2, (7, 7), (3, 3), None, 1e-6)


@needs_extension
def test_infinite_bias() -> None:
    """Keys that a bias of -inf takes away, and the NaN of a row without any key, are torch's."""
    torch.manual_seed(3)
    qkv = torch.randn(1, 4, 4, 3 * 2 * 4)
    bias = torch.randn(2, 16, 16).masked_fill(torch.rand(2, 16, 16) < 0.4, -torch.inf)
    bias[:, :, 0] = 0.0
    assert_as_exact(qkv, 2, (4, 4), (0, 0), bias, 1e-6)
    bias[0, 3] = -torch.inf
    out = ops.window_attention(qkv, 2, (4, 4), (0, 0), bias)
    with use_backend("reference"):
        assert torch.equal(out.isnan(), ops.window_attention(qkv, 2, (4, 4), (0, 0), bias).isnan())


@needs_extension
def test_more_than_65535_windows() -> None:
    torch.manual_seed(4)
    assert_as_exact(torch.randn(1, 300, 440, 12), 2, (2, 1), (0, 0), torch.randn(2, 2, 2), 1e-5)


@needs_extension
def test_threads_agree() -> None:
    """Bit for bit, the gradient of the bias too."""
    torch.manual_seed(5)
    qkv, bias, gradient = torch.randn(5, 21, 14, 96), torch.randn(4, 49, 49), torch.randn(5, 21, 14, 32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(both_ways(qkv, 4, (7, 7), (3, 3), bias, gradient))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_extension
def test_gradients_of_any_layout() -> None:
    qkv = torch.randn(2, 48, 6, 8, dtype=torch.float64).permute(0, 2, 3, 1)  # [2, 6, 8, 48], channels far apart
    gradient = torch.randn(2, 8, 16, 6, dtype=torch.float64).permute(0, 3, 1, 2)  # [2, 6, 8, 16]
    got = both_ways(qkv, 2, (3, 4), (1, 2), None, gradient)
    for one, other in zip(
        got, both_ways(qkv.contiguous(), 2, (3, 4), (1, 2), None, gradient.contiguous()), strict=True
    ):
        assert torch.equal(one, other)
    expanded = both_ways(qkv, 2, (3, 4), (1, 2), None, torch.ones((), dtype=torch.float64).expand(2, 6, 8, 16))
    assert torch.isfinite(expanded[1]).all()


@pytest.mark.slow
def test_opcheck() -> None:
    for requires_grad in (False, True):  # without and with a bias
        qkv = torch.randn(2, 5, 4, 12).requires_grad_(requires_grad)
        bias = torch.randn(2, 6, 6).requires_grad_() if requires_grad else None
        settings = (None, None, bias, None, None, None, 2, [3, 2], [1, 0], [3, 2], 0.7, "masked", 0.0)
        torch.library.opcheck(torch.ops.asvit_fast.window_attention.default, (qkv, *settings))
        out, statistics = torch.ops.asvit_fast.window_attention(qkv, *settings)
        arguments = (
            torch.randn_like(out),
            out.detach(),
            statistics.detach(),
            qkv,
            *settings,
            [True, False, False, requires_grad, False, False, False],
        )
        torch.library.opcheck(torch.ops.asvit_fast.window_attention_gradients.default, arguments)


@needs_extension
def test_double_backward_with_bias() -> None:
    qkv = torch.randn(1, 4, 3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, table: Tensor) -> Tensor:
        return ops.window_attention(x, 2, (2, 2), (1, 1), table)

    with use_backend("cpu"):
        torch.autograd.gradcheck(f, (qkv, bias))
        torch.autograd.gradgradcheck(f, (qkv, bias))
        torch.autograd.gradgradcheck(lambda x: f(x, bias.detach()), (qkv,))


@needs_extension
def test_autocast_and_mixed_bias() -> None:
    """Under autocast qkv is bfloat16 and the bias a float32 parameter, whose gradient is float32."""
    linear, bias = torch.nn.Linear(16, 48), torch.randn(2, 16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.window_attention(linear(torch.randn(1, 4, 4, 16)), 2, (4, 4), (0, 0), bias)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32 and linear.weight.grad is not None


@needs_extension
@pytest.mark.parametrize("mode", ["compile", "checkpoint", "export", "vmap"])
def test_inside(mode: str) -> None:
    """torch.compile(fullgraph), activation checkpointing, torch.export and vmap give the same."""
    qkv, bias = torch.randn(2, 6, 7, 48), torch.randn(2, 9, 9)

    def f(x: Tensor) -> Tensor:
        return ops.window_attention(x, 2, (3, 3), (1, 1), bias)

    def run(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = function(leaf)
        return [out, *torch.autograd.grad(out.square().sum(), leaf)]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    changed: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "compile": lambda: torch.compile(f, fullgraph=True, dynamic=True),
        "checkpoint": lambda: lambda x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
        "export": lambda: torch.export.export(Module(), (qkv,)).module(),
        "vmap": lambda: lambda x: torch.vmap(f)(x.unsqueeze(1)).squeeze(1),
    }
    for got, want in zip(run(changed[mode]()), run(f), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("shape", [(8, 8, 2, 4), (14, 7, 4, 8), (14, 14, 4, 8), (14, 7, 4, 32)])
def test_saturated_attention(shape: tuple[int, int, int, int]) -> None:
    """Scores in the thousands: a row's weights are almost 0 and 1, its gradients what large numbers leave. Rounding a
    product with log2(e), or sums in another order, would cost up to thirty times torch's error."""
    side, window, heads, head_dim = shape
    torch.manual_seed(0)
    qkv = 100 * torch.randn(2, side, side, 3 * heads * head_dim)
    cotangent = torch.randn(2, side, side, heads * head_dim)

    def both(dtype: torch.dtype) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        y = ops.window_attention(x, heads, (window, window))
        return [y, torch.autograd.grad(y, x, cotangent.to(dtype))[0]]

    with use_backend("reference"):
        exact, eager = both(torch.float64), both(torch.float32)
    for found, torchs, want in zip(both(torch.float32), eager, exact, strict=True):
        assert (found - want).norm() < 2 * (torchs - want).norm() + 1e-6 * want.norm()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_16_bits_are_not_widened_in_memory(dtype: torch.dtype) -> None:
    """Beside results only what threads need for one window at a time."""
    qkv = torch.randn(4, 56, 56, 3 * 64).to(dtype).requires_grad_()
    y = ops.window_attention(qkv, 2, (7, 7))
    statistics, working = 2 * 2 * y.numel() // 64 * 4, 2 << 20  # bytes
    cotangent = torch.ones_like(y)
    with torch.no_grad():
        peak = peak_allocation(lambda: ops.window_attention(qkv, 2, (7, 7)), y.device)
    assert peak <= y.nbytes + statistics + working
    peak = peak_allocation(lambda: torch.autograd.grad(y, qkv, cotangent), y.device)
    assert peak <= qkv.nbytes + working


@needs_extension
def test_windows_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is alone attends itself: its value, with nothing to compute; parameters still get gradients."""
    qkv = torch.randn(2, 3, 2, 24, requires_grad=True)
    with use_backend("reference"):
        want = ops.window_attention(qkv, 4, (1, 1))
    bias = torch.randn(4, 1, 1, requires_grad=True)
    through_op = ops.window_attention(qkv, 4, (1, 1), bias=bias)
    torch.testing.assert_close(through_op, want)
    assert torch.autograd.grad(through_op.sum(), bias)[0].shape == bias.shape
    monkeypatch.setattr(importlib.import_module("asvit_fast.ops.window_attention"), "WINDOW_ATTENTION", None)
    found = ops.window_attention(qkv, 4, (1, 1))
    assert found.is_contiguous()
    torch.testing.assert_close(found, want)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, qkv, cotangent), torch.autograd.grad(want, qkv, cotangent), atol=1e-6, rtol=1e-5
    )
