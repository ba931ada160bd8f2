"""The NTK Gram of batches in another order, of one parameter in two places of a call, and of complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ntk_oracle import Of, assert_gram_is_right, linears, parameter, tokens
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.scoring.per_sample import _Recorder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def norm_with_one_parameter(normalise: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """``normalise``: activations [B, 8, 6, 6] and a parameter [8] to use as weight and as bias."""
    return Of(
        lambda m, x: normalise(m.conv(x), m.weight).exp().flatten(1), conv=nn.Conv2d(3, 8, 3), weight=parameter(8)
    )


def rotated(m: nn.Module, x: Tensor) -> Tensor:
    return (m.conv(x) * (1 + 1j) * m.scale_weight + m.shift_weight).abs().flatten(1)


def complex_weights(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(torch.fft.fft(m.a(tokens(x))), torch.complex(m.real_weight, m.imaginary_weight)).abs().mean(1)


def in_order(order: Callable[[Tensor], Tensor]) -> nn.Module:
    """The second layer sees the batch in the order [B] that ``order`` makes of the images; its result is put back."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        o = order(x)
        return m.second(torch.tanh(m.first(x))[o]).tanh()[o.argsort()].flatten(1)

    return Of(forward, first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(4, 4, 3))


def inner_swapped(x: Tensor) -> Tensor:
    order = torch.arange(len(x))
    order[1:-1] = order[1:-1].flip(0)
    return order


def interleaved(x: Tensor) -> Tensor:
    return torch.arange(len(x)).view(2, -1).t().flatten() if len(x) % 2 == 0 else torch.arange(len(x))


def features_swapped(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(tokens(x)).exp().mean(1)[inner_swapped(x)]


def partly_mixed(m: nn.Module, x: Tensor) -> Tensor:
    """Only samples that are neither first nor last see each other."""
    y = torch.tanh(m.a(tokens(x)))
    return m.b(y + 0.1 * y[inner_swapped(x)]).tanh().mean(1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layer norm, one parameter": lambda: norm_with_one_parameter(
        lambda x, w: F.layer_norm(x.flatten(2).transpose(1, 2), (8,), w, w)
    ),
    "layer norm, one parameter under two shapes": lambda: norm_with_one_parameter(
        lambda x, w: F.layer_norm(x.flatten(2).transpose(1, 2), (8,), w.view(-1), w)
    ),
    "batch norm, one parameter": lambda: norm_with_one_parameter(
        lambda x, w: F.batch_norm(x, x.new_zeros(8), x.new_ones(8), w, w)
    ),
    "group norm, one parameter": lambda: norm_with_one_parameter(lambda x, w: F.group_norm(x, 2, w, w)),
    "merged patches, one parameter": lambda: Of(
        lambda m, x: af.ops.patch_merge(
            m.conv(x).permute(0, 2, 3, 1), m.weight, 2, 2, m.norm_weight, m.norm_weight
        ).mean((1, 2)),
        conv=nn.Conv2d(3, 4, 3),
        weight=parameter(5, 16),
        norm_weight=parameter(16),
    ),
    "complex activations": lambda: Of(
        rotated, conv=nn.Conv2d(3, 8, 3), scale_weight=parameter(8, 1, 1), shift_weight=parameter(8, 1, 1)
    ),
    "complex weights": lambda: Of(
        complex_weights, real_weight=parameter(4, 8), imaginary_weight=parameter(4, 8), **linears(a=8)
    ),
}


def experts(m: nn.Module, x: Tensor) -> Tensor:
    """Each sample has one of two layers, one of which may have none."""
    x = torch.tanh(m.a(tokens(x)))
    to_first = x.mean((1, 2)) > m.threshold  # [B]
    out = torch.zeros_like(x)
    out[to_first], out[~to_first] = m.first(x[to_first]), m.second(x[~to_first])
    return out.mean(1)


def of_sorted_tokens(m: nn.Module, x: Tensor) -> Tensor:
    """A layer on the tokens of all samples, sorted."""
    x = torch.tanh(m.a(tokens(x)))
    order = x.mean(2).flatten().argsort()  # [B*24]
    out = torch.empty_like(x).flatten(0, 1)
    out[order] = m.b(x.flatten(0, 1)[order]).tanh()
    return out.view_as(x).mean(1)


# right for two or three images, or for some images
REORDERED: dict[str, Callable[[], nn.Module]] = {
    "sorted": lambda: in_order(lambda x: x.mean((1, 2, 3)).argsort(descending=True)),
    "best first": lambda: in_order(lambda x: x.amax((1, 2, 3)).topk(len(x)).indices),
    "inner swapped": lambda: in_order(inner_swapped),
    "interleaved": lambda: in_order(interleaved),
    "features swapped": lambda: Of(features_swapped, **linears(a=8)),
    "experts": lambda: Of(experts, threshold=0.0, **linears(a=8, first=8, second=8)),
    "experts, one without samples": lambda: Of(experts, threshold=1.0, **linears(a=8, first=8, second=8)),
    "sorted tokens": lambda: Of(of_sorted_tokens, **linears(a=8, b=8)),
    "sorted values": lambda: Of(
        lambda m, x: m.b(m.a(tokens(x)).tanh().sort(0).values).tanh().mean(1), **linears(a=8, b=8)
    ),
    "partly mixed": lambda: Of(partly_mixed, **linears(a=8, b=4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_gram_of_modules(name: str) -> None:
    model = MODULES[name]().double()
    for batch in (1, 2, 3):
        assert_gram_is_right(model, torch.randn(batch, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("batch", [2, 3, 4, 6])
@pytest.mark.parametrize("name", REORDERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gram_of_modules_that_reorder_the_batch(name: str, batch: int, dtype: torch.dtype) -> None:
    model = REORDERED[name]().to(dtype)
    assert_gram_is_right(model, torch.randn(batch, 3, 8, 8, dtype=dtype), 1e-9 if dtype == torch.float64 else 1e-5)


def test_gram_of_complex_parameters() -> None:
    """Counts the real and the imaginary part of each, like two real parameters."""
    model = Of(complex_weights, real_weight=parameter(4, 8), imaginary_weight=parameter(4, 8), **linears(a=8)).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = af.ntk_gram(model, images)
    weight = torch.complex(model.real_weight, model.imaginary_weight)
    same = Of(
        lambda m, x: F.linear(torch.fft.fft(m.a(tokens(x))), m.weight).abs().mean(1),
        a=model.a,
        weight=nn.Parameter(weight.detach()),
    )
    torch.testing.assert_close(af.ntk_gram(same, images), expected)


@pytest.mark.parametrize("name", ["sorted", "inner swapped"])
def test_hooks_that_reorder_the_batch(name: str) -> None:
    """Modules of known libraries alone, and hooks."""
    order = {"sorted": lambda x: x.mean((1, 2, 3)).argsort(descending=True), "inner swapped": inner_swapped}[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()).double()
    orders: list[Tensor] = []

    def reorder(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        orders.append(order(args[0]))
        return args[0][orders[-1]]

    model[2].register_forward_pre_hook(reorder)
    model[2].register_forward_hook(lambda module, args, out: out[orders.pop().argsort()])
    assert_gram_is_right(model, torch.randn(6, 3, 8, 8, dtype=torch.float64))


def test_replaced_forward_that_reorders_the_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten()).double()
    second = model[2]

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x[inner_swapped(x)], second.weight)[inner_swapped(x)]

    second.forward = forward
    second.bias = None
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    expected = Of(
        lambda m, x: F.conv2d(m.first(x).tanh(), m.weight).tanh().flatten(1), first=model[0], weight=second.weight
    )
    torch.testing.assert_close(af.ntk_gram(model, images), af.ntk_gram(expected, images))


@pytest.mark.parametrize("batch", [4, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rounding_is_no_other_order(batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of one's own are checked, and those that keep the order stay on the fast path."""
    measured: list[_Recorder] = []
    measure = _Recorder.measure
    monkeypatch.setattr(_Recorder, "measure", lambda self, out: (measured.append(self), measure(self, out)))
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LayerNorm(64)]
    layers = nn.Sequential(*layers, nn.Linear(64, 5)).to(dtype)
    images = torch.randn(batch, 3, 8, 8, dtype=dtype)
    expected = af.ntk_gram(layers, images)
    assert not measured
    gram = af.ntk_gram(Of(lambda m, x: m.layers(x), layers=layers), images)
    assert len(measured) == 1 and not measured[0].mixing
    torch.testing.assert_close(gram, expected)
