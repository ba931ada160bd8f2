"""window_attention on maps of three axes, from three maps, with a scale per head and with windows of keys around those
of queries: against its definition token by token, and every backend against the reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy import TINY, assert_accurate
from stacked import every_isa, needs_extension
from torch import Tensor

from asvit_fast import ops
from asvit_fast.backends import use_backend

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    size: Sizes
    heads: int
    head_dim: int
    window: Sizes
    shift: Sizes
    layout: str
    kv_window: Sizes | None = None

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def pads(self) -> bool:
        return self.layout in ("timm", "torchvision")

    def __str__(self) -> str:
        words = ("x".join(map(str, sizes)) for sizes in (self.size, self.window, self.kv_window or ()))
        return f"{self.layout}-{'-'.join(words)}"


# --------------------------------------------------------------------------- the definition


def _axis_places(size: int, w: int, s: int, layout: str) -> list[tuple[int | None, int, int, int]]:
    """(token or None, window, place in it, region) of every position along one axis of the padded and rolled map."""
    padded = math.ceil(size / w) * w
    places = []
    for position in range(padded):
        if layout == "timm":
            token = (position + s) % size if position < size else None
        else:
            token = (position + s) % padded
            token = token if token < size else None
        region = int(s > 0 and position >= padded - w) + int(s > 0 and position >= padded - s)
        count = padded // w
        places.append(
            (token, *((position % count, position // count) if layout == "grid" else divmod(position, w)), region)
        )
    return places


def _flat(indices: tuple[int, ...], lengths: Sizes) -> int:
    number = 0
    for index, length in zip(indices, lengths, strict=True):
        number = number * length + index
    return number


def by_definition(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """[B, *size, C], query by query."""
    q, k, v = (tensors[name].unflatten(-1, (case.heads, case.head_dim)) for name in "qkv")  # [B, *size, heads, d]
    _, pad_k, pad_v = tensors.get("padding", q.new_zeros(3 * case.channels)).view(3, case.heads, case.head_dim)
    keys = case.kv_window or case.window
    axes = [_axis_places(n, w, s, case.layout) for n, w, s in zip(case.size, case.window, case.shift, strict=True)]
    out = torch.zeros_like(q)
    for place in itertools.product(*axes):
        tokens, windows, inside, regions = zip(*place, strict=True)
        if None in tokens:
            continue
        scores, values = [], []
        for others in _keys_of(case, axes, windows, keys):
            other, key_place, key_regions = others
            is_padding = any(t is None for t in other)
            apart = case.kv_window is None and key_regions != regions
            if case.layout == "masked" and (is_padding or apart):
                continue
            at = (slice(None), *other)
            key = pad_k.expand(q.shape[0], -1, -1) if is_padding else k[at]  # [B, heads, d]
            score = (q[(slice(None), *tokens)] * key).sum(-1) * tensors["scale"]  # [B, heads]
            score = score + tensors["bias"][:, _flat(inside, case.window), _flat(key_place, keys)]
            scores.append(score - 100.0 * apart)
            values.append(pad_v.expand(q.shape[0], -1, -1) if is_padding else v[at])
        weights = torch.stack(scores, -1).softmax(-1)  # [B, heads, keys]
        attended = torch.einsum("bhn,bnhd->bhd", weights, torch.stack(values, 1))
        factor = tensors["attn_scale"][:, None]
        out[(slice(None), *tokens)] = (1 + factor) * attended - factor * _mean(values, scores)
    return out.flatten(-2)


def _mean(values: list[Tensor], scores: list[Tensor]) -> Tensor:
    """Of the values that are not set apart, [B, heads, d]."""
    near = [value for value, score in zip(values, scores, strict=True) if score.max() > -50.0]
    return torch.stack(near).mean(0)


def _keys_of(case: Case, axes: list, windows: Sizes, keys: Sizes) -> Any:
    """(tokens or None, places, regions) of all keys of a window."""
    if case.kv_window is None:
        inside = [[p for p in axis if p[1] == w] for axis, w in zip(axes, windows, strict=True)]
        for place in itertools.product(*inside):
            tokens, _, places, regions = zip(*place, strict=True)
            yield tokens, places, regions
        return
    for places in itertools.product(*map(range, keys)):
        at = [w * n - (m - n) // 2 + p for w, n, m, p in zip(windows, case.window, keys, places, strict=True)]
        yield tuple(t if 0 <= t < n else None for t, n in zip(at, case.size, strict=True)), places, None


# --------------------------------------------------------------------------- cases


def random_tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    queries, keys = math.prod(case.window), math.prod(case.kv_window or case.window)
    maps = {name: draw(2, *case.size, case.channels) for name in "qkv"}
    scale = draw(case.heads).abs() * case.head_dim**-0.5  # no row of a single weight, which has no gradient
    parameters = {"bias": draw(case.heads, queries, keys), "attn_scale": draw(case.heads), "scale": scale}
    return maps | parameters | ({"padding": draw(3 * case.channels)} if case.pads else {})


def call(case: Case, tensors: dict[str, Tensor], fused: bool) -> Tensor:
    maps = tuple(tensors[name] for name in "qkv")
    parameters = {name: x for name, x in tensors.items() if name not in "qkv"}
    return ops.window_attention(
        torch.cat(maps, -1) if fused else maps, case.heads, case.window, case.shift, layout=case.layout,
        kv_window=case.kv_window, **parameters,
    )  # fmt: skip


def both_ways(case: Case, tensors: dict[str, Tensor], cotangent: Tensor, fused: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = call(case, leaves, fused)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


SMALL = [
    Case((3, 4, 5), 2, 3, (2, 2, 3), (1, 1, 2), "masked"),
    Case((4, 3, 4), 1, 2, (2, 3, 2), (0, 1, 1), "timm"),
    Case((3, 4, 3), 2, 2, (2, 2, 2), (1, 0, 1), "torchvision"),
    Case((4, 4, 6), 2, 2, (2, 2, 3), (0, 0, 0), "grid"),
    Case((1, 2, 1), 1, 4, (3, 3, 3), (1, 2, 0), "timm"),
    Case((5, 7), 2, 3, (3, 4), (1, 2), "timm"),
    Case((5, 6), 2, 3, (3, 2), (0, 0), "masked", (5, 4)),
    Case((5, 6), 2, 3, (2, 4), (0, 0), "timm", (4, 4)),
    Case((4, 4), 1, 3, (2, 2), (0, 0), "torchvision", (6, 2)),
    Case((3, 2, 4), 1, 2, (2, 2, 2), (0, 0, 0), "masked", (4, 2, 6)),
    Case((2, 3, 2), 1, 2, (2, 2, 1), (0, 0, 0), "timm", (4, 4, 3)),
]


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("path", ["default", "reference"])
def test_by_definition(case: Case, path: str) -> None:
    tensors = random_tensors(case)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    expected = by_definition(case, leaves)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
    for fused in (False, True):
        if path == "reference":
            with use_backend("reference"):
                got = both_ways(case, tensors, cotangent, fused)
        else:
            got = both_ways(case, tensors, cotangent, fused)
        torch.testing.assert_close(got.pop("output"), expected, rtol=1e-11, atol=1e-12)
        for (name, gradient), want in zip(got.items(), wanted, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


LARGE = [  # windows of several groups and tiles, cut ones, regions along every axis
    Case((7, 14, 9), 2, 16, (7, 7, 7), (3, 3, 3), "torchvision"),
    Case((8, 9, 8), 1, 5, (8, 7, 7), (0, 3, 3), "timm"),
    Case((5, 8, 8), 3, 8, (2, 7, 7), (1, 3, 3), "masked"),
    Case((4, 8, 8), 1, 32, (2, 4, 4), (0, 0, 0), "grid"),
    Case((20, 18), 2, 5, (8, 8), (0, 0), "timm", (12, 12)),
    Case((20, 18), 2, 32, (8, 8), (0, 0), "masked", (12, 10)),
    Case((6, 9, 8), 1, 8, (4, 4, 4), (0, 0, 0), "torchvision", (6, 6, 6)),
    Case((15, 14), 2, 22, (7, 7), (3, 0), "masked"),
]


@needs_extension
@every_isa
@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_isa(isa: str, case: Case, dtype: torch.dtype) -> None:
    """error(ours) < 2 error(plain PyTorch ops, same dtype) + tiny, against float64: forward and all gradients."""
    tensors = random_tensors(case, dtype)
    cotangent = torch.randn(2, *case.size, case.channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = both_ways(case, tensors, cotangent)
    with use_backend("reference"):
        theirs = both_ways(case, tensors, cotangent)
        exact = both_ways(case, {name: x.double() for name, x in tensors.items()}, cotangent.double())
    for name, want in exact.items():
        assert ours[name].dtype == dtype
        # one sum over both maps: its roundings add up as a random walk does, and torch's may meet the truth by luck
        tiny = TINY[dtype] * (math.sqrt(2 * math.prod(case.size)) if want.dim() == 1 else 1)
        assert_accurate(name, ours[name], theirs[name], want, tiny)


@needs_extension
@pytest.mark.parametrize("case", [LARGE[0], LARGE[4]], ids=str)
def test_threads_agree(case: Case) -> None:
    """Bit for bit, the gradients of parameters too."""
    tensors, cotangent = random_tensors(case, torch.float32), torch.randn(2, *case.size, case.channels)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(both_ways(case, tensors, cotangent))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@needs_extension
@pytest.mark.parametrize("case", [LARGE[2], LARGE[4]], ids=str)
def test_any_strides(case: Case) -> None:
    """Parts of a fused map, channels far apart, a crop of a larger map and an expanded one, with the same bits."""
    tensors, cotangent = random_tensors(case, torch.float32), torch.randn(2, *case.size, case.channels)
    tensors["v"] = tensors["v"][:1].expand(2, *(-1 for _ in case.size), -1)
    expected = both_ways(case, {name: x.contiguous() for name, x in tensors.items()}, cotangent)
    q, k, v = (tensors[name] for name in "qkv")
    part = torch.cat([k, q, v], -1)[..., case.channels : 2 * case.channels]
    far = k.movedim(-1, 1).contiguous().movedim(1, -1)
    larger = torch.full((2, *(n + 2 for n in case.size), case.channels + 1), torch.nan)
    crop = larger[(slice(None), *(slice(1, n + 1) for n in case.size), slice(1, None))]
    crop.copy_(q)
    for maps in ((part, far, v), (crop, part.new_tensor(k.numpy()), v)):
        got = both_ways(case, tensors | dict(zip("qkv", maps, strict=True)), cotangent)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_depth_one_is_two_axes() -> None:
    """Bit for bit."""
    qkv, bias = torch.randn(2, 9, 10, 48), torch.randn(2, 12, 12)
    for layout in ("masked", "timm", "torchvision"):
        flat = ops.window_attention(qkv, 2, (3, 4), (1, 2), bias, layout=layout)
        assert torch.equal(ops.window_attention(qkv[:, None], 2, (1, 3, 4), (0, 1, 2), bias, layout=layout)[:, 0], flat)


def test_scale_per_head_is_a_scale() -> None:
    qkv, factors = torch.randn(2, 6, 8, 48, dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
    got = ops.window_attention(qkv, 2, (3, 4), (1, 2), scale=factors)
    for head, factor in enumerate(factors.tolist()):
        want = ops.window_attention(qkv, 2, (3, 4), (1, 2), scale=factor)
        torch.testing.assert_close(got.unflatten(3, (2, 8))[..., head, :], want.unflatten(3, (2, 8))[..., head, :])


def test_windows_larger_than_the_map() -> None:
    """In the layout "masked" they are the map, with the part of the bias that is there."""
    qkv, bias = torch.randn(1, 2, 3, 4, 24), torch.randn(2, 60, 60)
    got = ops.window_attention(qkv, 2, (3, 4, 5), bias=bias)
    places = torch.arange(60).view(3, 4, 5)[:2, :3, :4].flatten()
    torch.testing.assert_close(got, ops.window_attention(qkv, 2, (2, 3, 4), bias=bias[:, places][:, :, places]))


@pytest.mark.parametrize("case", [SMALL[0], SMALL[6]], ids=str)
def test_derivatives(case: Case) -> None:
    """gradcheck of both orders, functorch and forward mode, compiled and exported."""
    tensors = random_tensors(case)
    names = list(tensors)

    def f(*values: Tensor) -> Tensor:
        return call(case, dict(zip(names, values, strict=True)), False)

    leaves = [x[:1].clone().requires_grad_() if name in "qkv" else x.requires_grad_() for name, x in tensors.items()]
    torch.autograd.gradcheck(f, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *x: f(*x).square().sum(), leaves, fast_mode=True)
    every = tuple(range(len(leaves)))
    gradients = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    torch.testing.assert_close(torch.func.grad(lambda *x: f(*x).square().sum(), every)(*leaves), gradients)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), gradients)


@needs_extension
@pytest.mark.parametrize("case", [SMALL[0], SMALL[7]], ids=str)
def test_opcheck(case: Case) -> None:
    tensors = {name: x.requires_grad_() for name, x in random_tensors(case, torch.float32).items()}
    operands = [tensors.get(name) for name in ("q", "k", "v", "bias", "padding", "attn_scale", "scale")]
    settings = (
        *operands,
        case.heads,
        list(case.window),
        list(case.shift),
        list(case.kv_window or case.window),
        1.0,
        case.layout,
        0.0,
    )
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.asvit_fast.window_attention.default, settings)
    out, statistics = torch.ops.asvit_fast.window_attention(*settings)
    arguments = (torch.randn_like(out), out.detach(), statistics.detach(), *settings)
    operation = torch.ops.asvit_fast.window_attention_gradients.default
    torch.library.opcheck(operation, (*arguments, [x is not None for x in operands]), test_utils=utilities)
    torch.library.opcheck(operation, (*arguments, [False, True, *[False] * 4, True]), test_utils=utilities)


def test_empty_and_autocast() -> None:
    case = LARGE[2]
    tensors = random_tensors(case, torch.float32)
    empty = tensors | {name: tensors[name][:0] for name in "qkv"}
    got = both_ways(case, empty, torch.randn(0, *case.size, case.channels))
    assert got["output"].shape == (0, *case.size, case.channels)
    assert all(not got[name].any() for name in ("bias", "attn_scale", "scale"))
    half = tensors | {name: tensors[name].bfloat16() for name in "qkv"}  # parameters stay in float32
    got = both_ways(case, half, torch.randn(2, *case.size, case.channels))
    assert {name for name, x in got.items() if x.dtype == torch.bfloat16} == {"output", "q", "k", "v"}
