"""Taylor propagation against torch.func where that is right, and float64 finite differences where it is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import CASES, golden, relative_error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import asvit_fast as af
from asvit_fast.taylor import Taylor, TaylorError, register_rule
from asvit_fast.taylor import value as taylor_value


def directions(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def finite_differences(
    f: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor, ddx: Tensor, h: float
) -> tuple[Tensor, Tensor]:
    """First and second derivative along the curve, fourth order in h."""
    at = {k: f(x + k * h * dx + (k * h) ** 2 / 2 * ddx) for k in (-2, -1, 0, 1, 2)}
    first = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    second = (-at[2] + 16 * at[1] - 30 * at[0] + 16 * at[-1] - at[-2]) / (12 * h * h)
    return first, second


def check(
    f: Callable[[Tensor], Tensor], x: Tensor, dx: Tensor, ddx: Tensor, h: float = 1e-3, tolerance: float = 1e-7
) -> None:
    y, v, a = af.jet(f, x, dx, ddx)
    y1, v1 = af.jvp(f, x, dx)  # order 1 alone
    first, second = finite_differences(f, x, dx, ddx, h)
    torch.testing.assert_close(y, f(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(y1, y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(v1, v, rtol=1e-10, atol=1e-12)
    scale = 1e-12 + float(second.abs().max())
    assert float((v - first).abs().max()) < tolerance * (1e-12 + float(first.abs().max()))
    assert float((a - second).abs().max()) < 1e2 * tolerance * scale


# ------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("radius", ["r1", "rN"])
@pytest.mark.parametrize("norm", ["ln", "id"])
@pytest.mark.parametrize("case", CASES)
def test_our_network_equals_the_authors(case: str, norm: str, radius: str) -> None:
    data = golden(case)
    model, theta = data.model(norm), data["theta"].reshape(-1, 1, 1, 1)
    u0, u1 = data.circle()
    x = data.scale(radius) * (u0 * theta.cos() + u1 * theta.sin())  # [10, 3, side, side]
    dx = data.scale(radius) * (u1 * theta.cos() - u0 * theta.sin())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # every function has a rule
        y, v, a = af.jet(model.score_features, x, dx, -x)
    for got, name in ((y, "out"), (v, "v"), (a, "a")):
        assert relative_error(got, data[f"{norm}.{radius}.{name}"]) < 1e-9


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "pvt_v2_b0", "convnext_atto"],
)
def test_timm_networks(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double().eval()
    x, dx, ddx = directions(1, 3, 224, 224)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(model, x, dx, ddx)
        with sdpa_kernel(SDPBackend.MATH):
            _, expected = torch.func.jvp(model, (x,), (dx,))
        torch.testing.assert_close(af.jvp(model, x, dx)[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["swinv2_cr_tiny_ns_224", "xcit_nano_12_p16_224", "efficientnet_b0"])
def test_more_timm_networks(name: str) -> None:
    """Cosine attention, cross-covariance attention, batch norm and SiLU."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().eval()
    x, dx, ddx = directions(1, 3, 224, 224)
    with torch.no_grad():
        check(model, x, dx, ddx, h=3e-4, tolerance=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("samvit_base_patch16", {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2}),  # a mask that moves
        (
            "sequencer2d_s",
            {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "hidden_sizes": (4, 4, 4, 4)},
        ),  # LSTM
        ("cait_xxs24_224", {"img_size": 32, "depth": 2}),
        ("resnet10t", {}),
        ("mobilevit_xxs", {}),
        ("edgenext_xx_small", {}),
    ],
)
def test_networks_against_reverse_over_reverse(name: str, options: dict[str, Any]) -> None:
    """To the last digits, kinks included."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **options).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # timm starts some at 0
    size = options.get("img_size", 32)
    x, dx, ddx = directions(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        y, v, a = af.jet(model, x, dx, ddx)
    time = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x + time * dx + time**2 / 2 * ddx).flatten()
    for i, output in enumerate(outputs):
        (speed,) = torch.autograd.grad(output, time, create_graph=True)
        (acceleration,) = torch.autograd.grad(speed, time, retain_graph=True)
        got, right = torch.stack([y[0, i], v[0, i], a[0, i]]), torch.stack([output, speed, acceleration])
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-11)


def test_our_network_on_odd_sizes() -> None:
    model = af.create_model(
        "5,8,2,1|2,4,3,2|3,2,2,1|2,1,2,2|16,9", img_size=64, num_classes=3, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        check(model, *directions(2, 3, 52, 37))


# ------------------------------------------------------------------ functions

W = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: 2 - x * 3 + x / 4 + (-x) * x - 1 / (x * x + 3) + x**3 + 2**x - abs(x) + (x - 1) @ W.T @ W,
    "constants": lambda x: (
        torch.add(x, W, alpha=2) + torch.sub(W, x) + x.add(1) + W / (x * x + 1) + W.mul(x) + torch.rsub(x, W, alpha=3)
    ),
    "broadcast": lambda x: x[:, None] + W[:, :, None] * x.mean() + x[0],
    "shapes": lambda x: (
        x.reshape(3, 10).t().unflatten(0, (5, 2)).flip(0).roll(1, 1).permute(2, 0, 1).flatten(1).unsqueeze(0)
    ),
    "pieces": lambda x: (
        torch.cat([*reversed(x.chunk(2, -1)), W[:, :1]], -1) + torch.stack(x.split(2, 1)).sum((0, 2))[:, None]
    ),
    "indexing": lambda x: x[1:, ::2] + x[:-1, [0, 2, 4]] + x[..., 0].masked_fill(x[:, 0] > 0, 1.0)[:4, None],
    "where": lambda x: torch.where(x > 0, x * x, 2.0) + torch.where(x > 1, W, x) + x.where(x < 0, x.exp()),
    "reductions": lambda x: (
        x.mean(0) + x.sum((0, 1)) + x.amax(1).sum() + x.max(0).values + torch.maximum(x, W).sum(0) + x.var(0)
    ),
    "iteration": lambda x: sum(row * (i + 1) for i, row in enumerate(x)),
    "writes": lambda x: _writes(x),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x[None], (2, 1), mode="circular")[0],
    "products": lambda x: (
        torch.einsum("ij,kj->ik", x, x) + x @ x.T + torch.bmm(x[None], x.T[None])[0] + torch.addmm(W[:, :5], x, x.T)
    ),
    "softmax": lambda x: x.softmax(-1) + F.log_softmax(x, 0) + torch.softmax(3 * x + 100, dim=1),
    "norms": lambda x: (
        F.layer_norm(x, (6,), W[0], W[1]) + F.rms_norm(x, (6,), W[0]) + F.layer_norm(x, (5, 6)) + F.normalize(x, dim=-1)
    ),
    "group_norm": lambda x: F.group_norm(x.reshape(1, 6, 5), 2, W[0], W[1]),
    "batch_norm": lambda x: F.batch_norm(x, W[0], W[1].exp(), W[2], W[3]),
    "activations": lambda x: (
        x.exp()
        + x.tanh()
        + x.sigmoid()
        + F.silu(x)
        + F.softplus(x)
        + F.mish(x)
        + F.elu(x, 0.5)
        + F.softplus(x, beta=2)
        + x.erf()
        + x.sin() * x.cos()
    ),
    "kinks": lambda x: (
        F.relu(x) + F.relu6(4 * x) + F.hardswish(3 * x) + F.hardsigmoid(x) + F.leaky_relu(x, 0.2) + x.clamp(-1, 1)
    ),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "roots": lambda x: (
        (x * x + 1).sqrt()
        + (x * x + 1).rsqrt()
        + (x * x + 2).log()
        + (x * x + 1).log1p()
        + (1 + x.square()).reciprocal()
    ),
    "convolutions": lambda x: F.conv2d(
        x.reshape(1, 2, 3, 5), W[:4, :4].reshape(4, 1, 2, 2), W[0, :4], groups=2, padding=1
    ),
    "pooling": lambda x: F.max_pool2d(x.reshape(1, 1, 5, 6), 2) + F.avg_pool2d(x.reshape(1, 1, 5, 6), 2),
    "interpolation": lambda x: F.interpolate(x.reshape(1, 1, 5, 6), size=(7, 9), mode="bicubic"),
    "fallback": lambda x: torch.logsumexp(x, 1) + torch.special.ndtr(x).sum(1) + torch.cummax(x, 1)[0].sum(1),
}


def _writes(x: Tensor) -> Tensor:
    y = x * 1
    y[1:3] = x[:2] * x[:2]
    y[0, 0] = 5.0
    y += 1
    y.mul_(x)
    return F.relu(y, inplace=True)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:asvit_fast.taylor. no rule")
def test_functions(name: str) -> None:
    check(FUNCTIONS[name], *directions(5, 6), h=2e-4, tolerance=3e-8)


@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal", "grouped"])
def test_attention(masked: str) -> None:
    x, dx, ddx = directions(2, 4, 9, 15)
    mask = {"bool": torch.rand(9, 9) > 0.3, "float": torch.randn(2, 1, 9, 9, dtype=torch.float64)}.get(masked)
    if masked == "bool":
        mask |= torch.eye(9, dtype=torch.bool)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        if masked == "grouped":
            return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=masked == "causal", scale=0.7)

    check(attend, x, dx, ddx)


@pytest.mark.parametrize("case", ["plain", "weights", "masked", "cross", "unbatched"])
def test_multihead_attention(case: str) -> None:
    torch.manual_seed(0)
    batch_first = case != "unbatched"
    layer = nn.MultiheadAttention(6, 2, batch_first=batch_first, kdim=4 if case == "cross" else None).double().eval()
    memory = torch.randn(2, 3, 4, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])

    def attend(x: Tensor) -> Tensor:
        if case == "cross":
            return layer(x, memory, torch.cat([memory, memory[..., :2]], -1), need_weights=False)[0]
        if case == "masked":
            return layer(x, x, x, attn_mask=causal, key_padding_mask=padding, need_weights=False)[0]
        out, weights = layer(x, x, x, need_weights=case == "weights")
        return out + weights.sum() * weights[..., :1].mean() if case == "weights" else out

    shape = (5, 6) if case == "unbatched" else (2, 5, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        check(attend, *directions(*shape))


def test_transformer_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True).double().eval()
    with torch.no_grad():
        check(layer, *directions(3, 5, 8), tolerance=1e-6)


def test_attention_split_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere, over batch or query rows, the result is the same."""
    from asvit_fast.ops.window_attention_taylor import PIECE_BYTES, attention_taylor_reference

    q, k, v = directions(3, 2, 3, 7, 4)  # [orders, batch, heads, tokens, d]
    mask = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    whole = attention_taylor_reference(q, k, v, mask, 0.5)
    for size in (1, 3 * 3 * 7 * 8 * 3, 3 * 3 * 7 * 8 * 15):  # single rows, part of a map, several maps
        monkeypatch.setitem(PIECE_BYTES, "cpu", size)
        torch.testing.assert_close(attention_taylor_reference(q, k, v, mask, 0.5), whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_window_attention(shift: tuple[int, int]) -> None:
    bias = torch.randn(2, 12, 12, dtype=torch.float64)
    check(lambda x: af.ops.window_attention(x, 2, (4, 3), shift, bias), *directions(2, 7, 8, 18))


def test_common_offset_of_the_scores_cancels() -> None:
    """softmax ignores what all scores of a row share; in float32 a huge common tangent must not drown the rest."""
    x, dx = (d.float() for d in directions(1, 1, 6, 12, count=2))
    offset = torch.zeros_like(dx)
    offset[..., 4:8] = 1000.0  # the same for every key

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)

    exact = af.jvp(attend, x.double(), (dx + offset).double())[1]
    got = af.jvp(attend, x, dx + offset)[1]
    assert relative_error(got, exact) < 2e-3


# ------------------------------------------------------------------ the value itself


def test_outputs_may_be_nested_and_constant() -> None:
    x, dx, ddx = directions(3)
    y, v, a = af.jet(lambda t: {"square": t * t, "rest": [torch.ones(2), 5, t]}, x, dx, ddx)
    torch.testing.assert_close(a["square"], 2 * dx * dx + 2 * x * ddx)
    assert torch.equal(v["rest"][0], torch.zeros(2)) and y["rest"][1] == 5 and torch.equal(v["rest"][2], dx)


def test_a_taylor_value_answers_for_its_primal() -> None:
    value = Taylor(torch.randn(3, 4, 5))
    assert (
        value.shape == (4, 5)
        and value.ndim == 2
        and value.dtype == torch.float32
        and len(value) == 4
        and value.order == 2
    )
    assert torch.equal(value > 0, value.primal > 0)
    assert torch.zeros_like(value).shape == (4, 5) and "order=2" in repr(value)
    with pytest.raises(TaylorError, match="truth value"):
        bool(value)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        value.no_such_attribute  # noqa: B018


def test_gradients_reach_the_weights() -> None:
    layer = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).double()
    x, dx, _ = directions(3, 4)
    speed = lambda: af.jvp(layer, x, dx)[1].square().sum()  # noqa: E731
    speed().backward()
    for (
        parameter
    ) in layer.parameters():  # against finite differences: torch's own reverse over forward is wrong for LayerNorm
        direction, h = torch.randn_like(parameter), 1e-5
        with torch.no_grad():
            parameter += h * direction
            above = speed()
            parameter -= 2 * h * direction
            below = speed()
            parameter += h * direction
        gradient = 0.0 if parameter.grad is None else float((parameter.grad * direction).sum())
        assert gradient == pytest.approx(float(above - below) / (2 * h), rel=1e-6, abs=1e-8)


def test_bias_of_a_linear_is_added_once_whoever_asks() -> None:
    """A GELU after a Linear adds its bias on the way; others, before or after it, find it added."""
    layer = nn.Linear(6, 8).double()

    def branches(t: Tensor) -> Tensor:
        h = layer(t)
        first = F.gelu(h)
        return first + h * h + F.gelu(h, approximate="tanh") + layer(t).tanh() + layer(t)[..., :1]

    inputs = directions(3, 5, 6)
    with torch.no_grad():
        check(branches, *inputs)
        expected = af.jet(branches, *inputs)
    torch.testing.assert_close(af.jet(branches, *inputs), expected)  # with gradients it is added at once


def test_fallback_warns_once_and_names_the_function() -> None:
    from asvit_fast import backends

    backends._notified.discard(("taylor", "special_i0"))
    x, dx, ddx = directions(4)
    with pytest.warns(backends.FallbackWarning, match=r"no rule for special_i0[^\n]*register_rule.$"):
        check(torch.special.i0, x, dx, ddx)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.jvp(torch.special.i0, x, dx)


def test_what_cannot_be_propagated_is_named() -> None:
    @torch.library.custom_op("asvit_fast_tests::opaque", mutates_args=())
    def opaque(x: Tensor) -> Tensor:
        return x.sin()

    x, dx, _ = directions(3)
    with pytest.raises((TaylorError, TypeError, RuntimeError), match="opaque"):
        af.jvp(lambda t: torch.ops.asvit_fast_tests.opaque(t), x, dx)
    with pytest.raises(TaylorError, match=r"batch_norm.*eval"):
        af.jvp(
            nn.BatchNorm1d(3).double(), torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        )
    with pytest.raises(TaylorError, match="dropout"):
        af.jvp(lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5), *directions(1, 4, 4, count=2))


def test_rules_of_users_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taylor_value, "_RULES", dict(taylor_value._RULES))  # others find the package's own rules

    @register_rule(torch.sinc)
    def sinc(func: Callable, args: tuple, kwargs: dict) -> Taylor:
        (x,) = args
        return torch.sin(math.pi * x) / (math.pi * x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(torch.sinc, *(d + 3 for d in directions(4)))


def test_mismatched_directions_are_refused() -> None:
    with pytest.raises(ValueError, match="dx must match x"):
        af.jvp(torch.sin, torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="ddx must match x"):
        af.jet(torch.sin, torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.float64))
