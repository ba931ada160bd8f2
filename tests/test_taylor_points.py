"""Taylor propagation where formulas break (0, ties, infinity), in other dtypes and shapes, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curves import MASK, P, W, check, directions, draw
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.taylor import TaylorError

pytestmark = pytest.mark.filterwarnings("ignore:asvit_fast.taylor. no rule")
INF = math.inf


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ exact values


@pytest.mark.parametrize(
    ("f", "value", "velocity", "acceleration"),
    [
        (lambda x: x**0, 1, 0, 0),
        (lambda x: x**1, 0, 2, 3),
        (lambda x: x**2, 0, 0, 8),
        (lambda x: x**3, 0, 0, 0),
        (lambda x: x**1.0, 0, 2, 3),
        (lambda x: torch.float_power(x, 2), 0, 0, 8),
        (lambda x: x ** tensor(0), 1, 0, 0),
        (lambda x: x ** tensor(1), 0, 2, 3),
        (lambda x: x ** torch.tensor([2]), 0, 0, 8),
        (lambda x: 0.0 ** (x + 1), 0, 0, 0),
        (lambda x: tensor(0) ** (x + 2), 0, 0, 0),
        (lambda x: 3.0**x, 1, 2 * math.log(3), 3 * math.log(3) + 4 * math.log(3) ** 2),
        (lambda x: x.square(), 0, 0, 8),
        (lambda x: (x * 0).sqrt(), 0, 0, 0),
        (lambda x: (x * 0).norm(), 0, 0, 0),
        (lambda x: (x * 0).abs(), 0, 0, 0),
        (lambda x: torch.linalg.norm(torch.stack([x, tensor(4)])), 4, 0, 1),
        (lambda x: torch.where(x < 1, x, (x - 5).sqrt()), 0, 2, 3),
        (lambda x: (x - 5).sqrt().masked_fill(x < 1, 7.0), 7, 0, 0),
        (lambda x: torch.sinc(x), 1, 0, -4 * math.pi**2 / 3),
        (lambda x: torch.maximum(x, x), 0, 2, 3),
        (lambda x: torch.stack([x, x]).amax(0), 0, 2, 3),
        (lambda x: torch.stack([x, x]).max(0).values, 0, 2, 3),
        (lambda x: torch.stack([x, x]).max(), 0, 2, 3),
        (lambda x: torch.stack([x, x, x]).median(), 0, 2, 3),
        (lambda x: (x + 1).prod() * x, 0, 2, 11),
        (lambda x: torch.stack([x, x]).prod(), 0, 0, 8),
        (lambda x: torch.stack([x, x + 1, x]).cumprod(0)[-1], 0, 0, 8),
        (lambda x: torch.logaddexp(x, tensor(-INF)), 0, 2, 3),
        (lambda x: F.gelu(x), 0, 1, 1.5 + 4 * 2 / math.sqrt(2 * math.pi)),
        (lambda x: F.normalize(torch.stack([x * 0, x * 0]), dim=0).sum(0), 0, 0, 0),
        (lambda x: torch.stack([x + 1, tensor(-INF)]).softmax(0)[:1].sum(0), 1, 0, 0),
        (lambda x: torch.stack([x, tensor(-INF)]).log_softmax(0)[0], 0, 0, 0),
        (lambda x: torch.stack([x, tensor(-INF)]).logsumexp(0), 0, 2, 3),
        (lambda x: F.softplus(x + 30), 30, 2, 3),
        (lambda x: torch.xlogy(x, tensor(2)), 0, 2 * math.log(2), 3 * math.log(2)),
        (lambda x: torch.nan_to_num(x / x, 5.0) + x, 5, 2, 3),
    ],
)
def test_at_zero(f: Callable[[Any], Any], value: float, velocity: float, acceleration: float) -> None:
    """x = 0, x' = 2, x'' = 3."""
    x, dx, ddx = tensor(0), tensor(2), tensor(3)
    y, v, a = af.jet(f, x, dx, ddx)
    for got, right in ((y, value), (v, velocity), (a, acceleration), (af.jvp(f, x, dx)[1], velocity)):
        torch.testing.assert_close(got.flatten(), tensor(right), rtol=1e-9, atol=1e-12)


def test_what_torchs_nested_forward_mode_has_wrong() -> None:
    x, dx = tensor(0, 1, 3).reshape(1, 1, 3), tensor(1, 0, 0).reshape(1, 1, 3)
    mean, deviation = x.mean(), (x.var(unbiased=False) + 1e-5).sqrt()
    a = af.jet(F.instance_norm, x, dx, torch.zeros(1, 1, 3, dtype=torch.float64))[2]
    torch.testing.assert_close(a.flatten(), tensor(0.1964, -0.1800, -0.0164), rtol=0, atol=1e-4)
    assert torch.allclose(F.instance_norm(x), (x - mean) / deviation)
    matrix, diagonal = tensor([2, 1], [1, 3]), torch.diag(tensor(1, 2))
    for det in (torch.det, torch.linalg.det, lambda m: torch.linalg.slogdet(m)[1].exp()):
        y, v, a = af.jet(det, matrix, diagonal, torch.zeros(2, 2, dtype=torch.float64))
        torch.testing.assert_close(torch.stack([y, v, a]), tensor(5, 7, 4), rtol=1e-12, atol=0)
    factor = torch.linalg.cholesky(matrix)
    got = af.jvp(torch.cholesky_inverse, factor, factor)[1]  # (L L^T)^-1 along L + t L is (1 + t)^-2 (L L^T)^-1
    torch.testing.assert_close(got, -2 * matrix.inverse())


# ------------------------------------------------------------------ dtypes, shapes, gradients

NETWORK = (
    ("rules", lambda x: (F.layer_norm(x, (6,)).tanh() @ W.to(x).T).softmax(-1) + F.rms_norm(x, (6,))[:, :5]),
    ("none", lambda x: torch.special.expit(x) * torch.atan(x) + torch.hypot(x, P.to(x)).cumprod(1)),
)


@pytest.mark.parametrize(("name", "f"), NETWORK)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_dtypes(name: str, f: Callable[[Any], Any], dtype: torch.dtype, tolerance: float) -> None:
    rounded = [d.to(dtype) for d in directions()]
    right = af.jet(f, *(d.double() for d in rounded))
    for got, expected in zip(af.jet(f, *rounded), right, strict=True):
        assert got.dtype == dtype
        assert float((got.double() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize(("name", "f"), NETWORK)
def test_memory_layouts(name: str, f: Callable[[Any], Any]) -> None:
    inputs = directions()
    expected = af.jet(f, *inputs)
    torch.testing.assert_close(af.jet(f, *(d.t().contiguous().t() for d in inputs)), expected)
    wide = [draw(5, 5, 12) for _ in inputs]
    for buffer, d in zip(wide, inputs, strict=True):
        buffer[:, ::2] = d
    torch.testing.assert_close(af.jet(f, *(buffer[:, ::2] for buffer in wide)), expected)


SHAPELESS = (
    torch.exp,
    torch.sinc,
    torch.special.i0,
    torch.nn.functional.gelu,
    lambda x: x.sum(),
    lambda x: x.softmax(-1),
    lambda x: x * 2 + x,
    lambda x: x.cumsum(0),
    lambda x: x.sort(-1)[0],
    lambda x: x.reshape(-1),
    lambda x: torch.stack([x, x]),
    lambda x: x**2,
    lambda x: torch.cat([x[None], x[None]]),
    lambda x: x.clamp(0, 1),
    lambda x: x.abs().sqrt(),
    lambda x: x.norm(),
    lambda x: x / (x * x + 1),
)


@pytest.mark.parametrize("f", SHAPELESS)
def test_zero_dimensions_and_no_elements(f: Callable[[Any], Any]) -> None:
    check(f, tensor(0.3).squeeze(), tensor(2).squeeze(), tensor(3).squeeze())
    empty = torch.zeros(2, 0, 3, dtype=torch.float64)
    for order in af.jet(f, empty, empty, empty):
        assert order.shape == f(empty).shape


@pytest.mark.parametrize(
    "f", [torch.atan, lambda x: F.instance_norm(x[None]), lambda x: torch.logsumexp(x, 1), torch.inverse]
)
def test_gradients_reach_what_moves_and_what_does_not(f: Callable[[Any], Any]) -> None:
    """Through rules and through backward passes, under inference mode as well."""
    weight = draw(31, 6, 6).requires_grad_()
    x, dx, ddx = (draw(seed, 6, 6).requires_grad_() for seed in (32, 33, 34))

    def acceleration(weight: Tensor, x: Tensor, dx: Tensor, ddx: Tensor) -> Tensor:
        return af.jet(lambda t: f(t * weight), x, dx, ddx)[2].sum()

    assert torch.autograd.gradcheck(acceleration, (weight, x, dx, ddx))
    with torch.inference_mode():
        again = acceleration(weight, *(d.detach().clone() for d in (x, dx, ddx)))
    torch.testing.assert_close(again, acceleration(weight, x, dx, ddx).detach())


def test_broadcasting_and_promotion() -> None:
    scalar = torch.tensor(2.0, dtype=torch.float64)
    check(lambda x: x[:, :1] * W + W[0] / (x * x + 1) - x[0] + scalar * x + 3 - x[..., None, None] ** 2, *directions())
    single = [d.float() for d in directions()]
    y, v, a = af.jet(lambda x: torch.add(x * scalar, W) + torch.where(MASK, x, W), *single)
    assert y.dtype == v.dtype == a.dtype == torch.float64
    torch.testing.assert_close(v, (single[1] * 2 + single[1] * MASK).double())
    assert af.jet(lambda x: x.to(torch.int32), *single)[1].dtype == torch.int32


# ------------------------------------------------------------------ random numbers, buffers, and what cannot move


CONSTANT = torch.tensor([5j], dtype=torch.complex128)
FIRST = torch.tensor([0])


@pytest.mark.parametrize(
    "f",
    [
        lambda z: z.index_add(0, FIRST, CONSTANT) ** 2,
        lambda z: z.index_copy(0, FIRST, CONSTANT) ** 2,
        lambda z: z.index_fill(0, FIRST, CONSTANT[0]) ** 2,
        lambda z: z.select_scatter(CONSTANT[0], 0, 1) ** 2,
        lambda z: z.slice_scatter(CONSTANT, 0, 1, 2) ** 2,
        lambda z: z.scatter(0, FIRST, CONSTANT) ** 2,
        lambda z: z.put(FIRST, CONSTANT) ** 2,
        lambda z: z.index_put((FIRST,), CONSTANT) ** 2,
        lambda z: z.masked_scatter(torch.tensor([True, False]), CONSTANT) ** 2,
        lambda z: CONSTANT.expand(2).index_add(0, torch.arange(2), z) ** 2,
        lambda z: torch.fft.irfft(torch.fft.rfft(z.real).index_copy(0, FIRST, CONSTANT + 1), n=2) ** 2,
        lambda z: torch.where(torch.tensor([True, False]), z.real, 2.5 + 1j) ** 2,
        lambda z: torch.cat([z.real, CONSTANT]) ** 2,
        lambda z: torch.stack([z.real[0], CONSTANT[0]]) ** 2,
        lambda z: torch.hstack([z.real, CONSTANT]) ** 2,
    ],
)
def test_complex_constants(f: Callable[[Any], Any]) -> None:
    """Their derivatives are zero, and what they are joined to becomes complex."""
    z, dz, ddz = (torch.complex(draw(seed, 2), draw(seed + 10, 2)) for seed in (1, 2, 3))
    assert af.jet(f, z, dz, ddz)[0].dtype == f(z).dtype
    check(f, z, dz, ddz)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.einsum(x, [0, 1], x, [0, 1], [0]),
        lambda x: torch.einsum(x, [0, 1], x.sin(), [2, 1], [0, 2]),
        lambda x: torch.einsum(W[:3, :4].double(), [0, 1], x, [2, 1]),
        lambda x: torch.einsum(x, [..., 1], x.cos(), [..., 1], [...]),
        lambda x: F.scaled_dot_product_attention(*torch.ones(3, 1, 3, 4, dtype=x.dtype).cumsum(2), attn_mask=x[:, :3]),
    ],
)
def test_other_ways_to_call(f: Callable[[Any], Any]) -> None:
    check(f, *(draw(seed, 3, 4) for seed in (1, 2, 3)))


def test_a_function_without_a_rule_draws_once() -> None:
    x, dx, ddx = directions()
    torch.manual_seed(3)
    y, v, a = af.jet(lambda t: F.rrelu(t, training=True), x, dx, ddx)
    torch.manual_seed(3)
    torch.testing.assert_close(y, F.rrelu(x, training=True))
    torch.testing.assert_close(torch.stack([v / dx, a / ddx]), (y / x).expand(2, 5, 6))
    after = torch.rand(1)
    torch.manual_seed(3)
    F.rrelu(x, training=True)
    assert torch.equal(torch.rand(1), after)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * ctx.saved_tensors[0] * gradient, None


def test_autograd_functions_are_right_or_named() -> None:
    x, dx, ddx = directions()
    weight = W.clone().requires_grad_()
    with torch.no_grad():
        check(lambda t: Square.apply(t, weight), x, dx, ddx)
    with pytest.raises(TaylorError, match=r"autograd.Function Square.*no_grad"):
        af.jet(lambda t: Square.apply(t, weight), x, dx, ddx)
    layer = nn.Linear(6, 6).double()
    with pytest.raises(TaylorError, match="Function Square"):
        af.jvp(lambda t: Square.apply(layer(t), 1.0), x, dx)


def test_compiled_functions_that_take_no_taylor_value_are_named() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(double)
    with pytest.raises(TaylorError, match="scripted"):
        af.jvp(lambda t: scripted(t), *directions()[:2])


@pytest.mark.parametrize(
    "f",
    [
        torch.tensor,
        torch.as_tensor,
        torch.asarray,
        np.sin,
        np.asarray,
        float,
        lambda x: x[0].tolist(),
        lambda x: torch.zeros(2).new_tensor(x),
    ],
)
def test_numbers_taken_out_of_a_moving_tensor_are_refused(f: Callable[[Any], Any]) -> None:
    with pytest.raises(TaylorError):
        af.jvp(lambda t: torch.as_tensor(f(t)), *directions()[:2])


def test_numbers_of_numpy_multiply() -> None:
    check(lambda x: np.float64(2) * x + np.float32(3) - x * np.float64(0.5) + x ** np.int64(2), *directions())


def test_points_where_torchs_formula_fails_are_named() -> None:
    zero, dx, ddx = (draw(1, 3, 3) * 0, draw(2, 3, 3), draw(3, 3, 3))
    with pytest.raises(TaylorError, match="det, and torch's formula"):
        af.jet(torch.det, zero, dx, ddx)


def test_mistakes_are_torchs_own_words() -> None:
    x, dx, _ = directions()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        af.jvp(lambda t: t @ torch.ones(3, 3, dtype=t.dtype), x, dx)
    with pytest.raises(TypeError, match=r"cat\(\)"):
        af.jvp(torch.cat, x, dx)
    with pytest.raises(ValueError, match="floating point"):
        af.jvp(torch.sin, torch.arange(3), torch.arange(3))


# ------------------------------------------------------------------ views, writes through them, moving numbers

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda x: x.mT.contiguous().mT,
}
LAID_OUT: tuple[Callable[[Any], Any], ...] = (
    lambda x: x.softmax(0),
    lambda x: x.softmax(-1),
    lambda x: x.log_softmax(1),
    lambda x: F.batch_norm(x, None, None, training=True),
    lambda x: F.batch_norm(x, P.new_zeros(x.shape[1]), P.new_ones(x.shape[1])),
    lambda x: F.group_norm(x, 2),
    F.instance_norm,
    lambda x: F.layer_norm(x, (6,)),
    lambda x: F.rms_norm(x, (6,)),
    F.normalize,
    torch.tanh,
    F.gelu,
    torch.expm1,
    torch.relu,
    torch.atan,
    torch.sqrt,
    lambda x: x + 1,
    lambda x: x - W,
    lambda x: x * x,
    lambda x: 2 / x,
    lambda x: x**2,
    lambda x: x.clamp(0, 1),
    lambda x: x.masked_fill(x > 0, 1.0),
    lambda x: torch.maximum(x, W),
    lambda x: torch.logaddexp(x, W),
    lambda x: x.sort(1)[0],
    lambda x: torch.cat([x, x]),
    lambda x: F.pad(x, (1, 1), value=1.0),
    lambda x: x.roll(1, 1),
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.scaled_dot_product_attention(x, x, x),
    lambda x: F.scaled_dot_product_attention(x, x, x, W.new_zeros(x.shape[2], x.shape[2])),
    lambda x: F.conv2d(W[None, None], x[:, :1]),
    lambda x: x.index_fill(0, torch.tensor([0]), 2.0),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_in_memory_as_torchs_do(layout: str) -> None:
    """So that ``view`` works where torch's does, and what is written through ``reshape`` arrives where torch's does."""
    x = LAYOUTS[layout](draw(41, 2, 4, 5, 6).abs() + 0.1)
    dx = torch.empty_like(x).copy_(draw(42, *x.shape))
    for number, f in enumerate(LAID_OUT):

        def written(t: Any, f: Callable[[Any], Any] = f) -> Any:
            y = f(t)
            y.reshape(-1).mul_(2)
            return y

        expected, (y, v) = written(x), af.jvp(written, x, dx)
        torch.testing.assert_close(y, expected, msg=lambda text, number=number: f"LAID_OUT[{number}]: {text}")
        plain = af.jvp(f, x, dx)
        torch.testing.assert_close(v * plain[0], plain[1] * y)  # both doubled or neither
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, expected)]
        assert strides[0] == strides[1], f"LAID_OUT[{number}]"


def test_numbers_that_move_keep_their_derivatives() -> None:
    for f in (
        lambda x: torch.clamp(x, min=x * x - 1),
        lambda x: x.clamp(max=x.mean()).softmax(-1),
        lambda x: x.clamp_min(x.mean()),
        lambda x: torch.clip(x, x.mean() - 1, x.mean()),
        lambda x: F.normalize(x, eps=x.mean().abs() * 9),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], scale=x.mean()),
        lambda x: torch.add(P, x, alpha=x.mean()),
        lambda x: torch.sub(x, P, alpha=x.mean()),
        lambda x: torch.rsub(x, x * x, alpha=x.mean()),
        lambda x: x * torch.full_like(x, x.mean()),
        lambda x: torch.full_like(P, x.mean()),
        lambda x: x.new_full((2,), x.mean()),
        lambda x: P.new_full((2, 3), fill_value=x.mean()),
    ):
        check(f, *directions())


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (lambda x: x.new_tensor(x), "becomes a number"),
        (lambda x: x.new_tensor([x[0, 0], 1.0]), "becomes a number"),
        (lambda x: torch.tensor([x[0, 0], x[1, 1]]), r"torch.tensor\(\[x"),
        (lambda x: F.layer_norm(x, (6,), eps=x.mean().abs()), "rule for layer_norm,"),
        (lambda x: F.group_norm(x, 2, eps=x.mean().abs()), "rule for group_norm,"),
        (lambda x: F.rms_norm(x, (6,), eps=x.mean().abs()), "rule for rms_norm,"),
        (lambda x: F.leaky_relu(x, x.mean()), "rule for leaky_relu,"),
        (lambda x: F.pad(x, (1, 1), value=x.mean()), "rule for pad,"),
        (lambda x: torch.func.vmap(torch.sin)(x), "torch.func.vmap"),
        (lambda x: torch.func.grad(torch.sum)(x), "torch.func.grad"),
    ],
)
def test_moving_numbers_that_torch_takes_the_value_of_are_refused(f: Callable[[Any], Any], named: str) -> None:
    with pytest.raises(TaylorError, match=named):
        af.jvp(f, *directions()[:2])
