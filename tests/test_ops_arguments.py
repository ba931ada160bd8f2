"""Demands of ops on their arguments: the same on every backend, before anything is computed or read."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stacked import needs_extension
from torch import Tensor

import asvit_fast as af
from asvit_fast import backends, ops
from asvit_fast.backends import use_backend

QKV = torch.linspace(-1, 1, 240).reshape(1, 4, 5, 12)  # two heads of two
STACK = torch.stack([QKV, QKV.sin()])
IMAGE, PATCHES = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), torch.linspace(-1, 1, 108).reshape(4, 3, 3, 3)
TOKENS, MERGE = torch.linspace(-1, 1, 48).reshape(1, 4, 4, 3), torch.linspace(-1, 1, 24).reshape(2, 12)
GAMMA = torch.ones(12)
ROWS = torch.linspace(-1, 1, 120).reshape(2, 5, 12)
SMALL, LARGE, FEATURES = torch.ones(3, 64), torch.ones(20000, 64), torch.ones(32, 64)
NO_INTEGERS = (True, 1.0, "1", None, float("nan"))
NO_NUMBERS = (True, "1", 1j, torch.ones(()), torch.ones(2))
NO_EPS = (*NO_NUMBERS, None, -1.0, -1e-12, float("nan"), float("inf"))
WITH_TRITON = ("attention ", "embedding", "merging", "gelu", "square")
HUGE = (2**31, 2**32, 2**62, 2**63, 2**64 + 2)


def attention(window=(2, 2), shift=(0, 0), heads=2, qkv=QKV, **others) -> Tensor:
    return ops.window_attention(qkv, heads, window, shift, **others)


def attention_taylor(window=(2, 2), shift=(0, 0), heads=2, qkv=STACK, **others) -> Tensor:
    return ops.window_attention_taylor(qkv, heads, window, shift, **others)


def embedding(stride=1, dilation=1, padding=(0, 0, 0, 0), image=IMAGE, weight=PATCHES, bias=None, **others) -> Tensor:
    return ops.patch_embed(image, weight, bias, stride, dilation, padding, **others)


def merging(kernel=2, stride=2, x=TOKENS, weight=MERGE, norm_weight=GAMMA, **others) -> Tensor:
    return ops.patch_merge(x, weight, kernel, stride, norm_weight, **others)


def misfits(shape: tuple[int, ...]) -> list[Tensor]:
    """Parameters that cannot stand for one of ``shape``: other shapes that broadcast or not, devices, dtypes."""
    zeros = torch.zeros(shape)
    shapes = [torch.zeros(()), torch.zeros([1] * len(shape)), zeros[None], torch.zeros([*shape[:-1], shape[-1] + 1])]
    types = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    return [*shapes, zeros.to("meta"), *(zeros.to(dtype) for dtype in types)]


def refused() -> list[tuple[str, Callable[[], object]]]:
    """Calls that no backend takes, each with its name."""
    calls: list[tuple[str, Callable[[], object]]] = []

    def refuse(function: Callable[..., Tensor], name: str, *values: object, **others: object) -> None:
        for value in values:
            kind = (list(value.shape), value.dtype, value.device.type) if isinstance(value, Tensor) else value
            arguments = {name: value, **others}
            calls.append((f"{function.__name__} {name}={kind}", functools.partial(function, **arguments)))

    for function in (attention, attention_taylor):
        refuse(function, "heads", 0, -1, 5, *NO_INTEGERS, *HUGE)
        for number in (0, -1, *NO_INTEGERS):
            refuse(function, "window", (number, 2), (2, number))
        for number in (-1, 2, *NO_INTEGERS, *HUGE):
            refuse(function, "shift", (number, 0), (0, number))
        refuse(function, "window", 2, (2,), (2, 2, 2), "22")
        refuse(function, "bias", *misfits((2, 4, 4)), torch.zeros(2, 20, 20))
    for layout in ("timm", "torchvision", "grid"):
        refuse(attention, "window", *((huge, huge) for huge in HUGE), layout=layout)
    refuse(attention, "attn_scale", *misfits((2,)))
    refuse(attention, "padding", *misfits((12,)), layout="timm")
    refuse(attention, "padding", torch.zeros(12))
    refuse(attention, "dropout", -0.1, 1.5, float("nan"))
    refuse(attention, "qkv", QKV[0], QKV[..., :0], QKV.int(), QKV.cfloat(), QKV.to(torch.float8_e5m2))
    refuse(attention_taylor, "qkv", QKV, STACK[:0], STACK.int(), STACK.repeat(2, 1, 1, 1, 1))
    refuse(attention_taylor, "bias", torch.zeros(2, 4, 4).double())
    numbers = [value for value in NO_NUMBERS if not isinstance(value, Tensor)]  # a tensor is a factor for each head
    refuse(attention, "scale", *numbers, *misfits((2,)), float("nan"), float("inf"), -float("inf"))
    refuse(attention_taylor, "scale", *NO_NUMBERS, float("nan"), float("inf"), -float("inf"))
    refuse(attention, "qkv", (QKV, QKV), (QKV[..., :4], QKV[..., :4], QKV[..., :2]), QKV[:, None])
    odd = (QKV[..., :4], QKV[:, :2, :, :4], QKV[..., :4].double(), QKV[..., :4].to("meta"))
    refuse(attention, "qkv", *((odd[0], x, odd[0]) for x in odd[1:]), *((odd[0], odd[0], x) for x in odd[1:]))
    refuse(attention, "kv_window", 4, (4,), (4, 3), (2, 1), (1, 1), (4, 4, 4), *((number, 2) for number in NO_INTEGERS))
    refuse(attention, "kv_window", (4, 4), shift=(1, 0))
    refuse(attention, "kv_window", (4, 4), layout="grid", qkv=QKV[:, :, :4])
    refuse(attention, "bias", torch.zeros(2, 4, 4), kv_window=(4, 4))
    refuse(attention, "kv_window", *((huge, huge) for huge in HUGE if huge % 2 == 0))
    for function in (embedding, merging):
        refuse(function, "eps", *NO_EPS)
    refuse(ops.layer_norm_taylor, "eps", *NO_EPS, x=ROWS)
    for name in ("stride", "dilation"):
        refuse(embedding, name, 0, -1, *NO_INTEGERS)
    refuse(embedding, "dilation", 4, *HUGE)
    for number in (-1, *NO_INTEGERS, *HUGE):
        refuse(embedding, "padding", (number, 0, 0, 0), (0, 0, 0, number))
    refuse(embedding, "padding", 1, (1, 1), "1111")
    for name in ("bias", "norm_weight"):
        refuse(embedding, name, *misfits((4,)))
    refuse(embedding, "norm_bias", *misfits((4,)), norm_weight=torch.ones(4))
    refuse(embedding, "norm_bias", torch.zeros(4))
    refuse(embedding, "image", IMAGE[0], IMAGE.half(), IMAGE.double(), IMAGE.int(), IMAGE[:, :, :2])
    odd = (PATCHES[0], PATCHES[:, :2], PATCHES[..., :2], PATCHES[:0], PATCHES.half(), PATCHES.to("meta"))
    refuse(embedding, "weight", *odd)
    for name in ("kernel", "stride"):
        refuse(merging, name, 0, -1, *NO_INTEGERS)
    refuse(merging, "kernel", 3, *HUGE)
    refuse(merging, "norm_weight", *misfits((12,)))
    refuse(merging, "norm_bias", *misfits((12,)))
    refuse(merging, "norm_bias", torch.zeros(12), norm_weight=None)
    for norm_weight in (torch.ones(12), None):
        refuse(merging, "bias", *misfits((2,)), norm_weight=norm_weight)
    refuse(merging, "x", TOKENS[0], TOKENS[..., :0], TOKENS[:, :0], TOKENS.int())
    refuse(merging, "weight", MERGE[0], MERGE[:, :11], MERGE.int(), MERGE.to("meta"))
    refuse(merging, "order", "swin")
    for function in (ops.gelu_taylor, ops.layer_norm_taylor):
        refuse(function, "bias", *misfits((12,)), x=ROWS)
    refuse(ops.layer_norm_taylor, "weight", *misfits((12,)), x=ROWS)
    refuse(ops.gelu_taylor, "approximate", "sigmoid", x=ROWS)
    for function in (ops.gelu_taylor, ops.layer_norm_taylor, ops.square_taylor, ops.tanh_taylor):
        refuse(function, "x", ROWS[:0], torch.zeros(4, 12), ROWS.int(), ROWS.to(torch.float8_e5m2), torch.zeros(()))
    refuse(ops.softmax_taylor, "s", ROWS[:0], torch.zeros(4, 12), ROWS.int(), torch.zeros(2), ROWS[..., :0])
    for x in (SMALL, LARGE):
        wrong = (torch.zeros(31), torch.zeros(32, 1), torch.zeros(32).to("meta"), torch.zeros(32).double())
        refuse(ops.linear, "bias", *wrong, x=x, weight=FEATURES)
        refuse(ops.linear, "weight", FEATURES[:, 1:], FEATURES[None], FEATURES.double(), FEATURES.to("meta"), x=x)
        refuse(ops.linear, "activation", "relu", x=x, weight=FEATURES)
    return calls


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_extension), "triton", "reference"])
def test_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one line that names the op."""
    if backend == "triton":  # which then fails otherwise, if a call comes that far
        pytest.importorskip("triton")
        monkeypatch.setattr(backends, "_reason", lambda *_: None)
    calls = [(name, call) for name, call in refused() if backend != "triton" or name.startswith(WITH_TRITON)]
    with use_backend(backend):
        for name, call in calls:
            try:
                call()
            except af.InputError as error:
                message = str(error)
            else:
                message = ""
            assert re.fullmatch(r"[a-z_]+: .+", message), f"{name} on {backend}: {message or 'was taken'}"


# --------------------------------------------------------------------------- what is larger than needed


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_extension), "reference"])
@pytest.mark.parametrize("huge", HUGE)
def test_larger_than_the_map(backend: str, huge: int) -> None:
    """Windows and strides beyond the map are the map, and so is a dilation that nothing is dilated by."""
    point = PATCHES[:, :, :1, :1].contiguous()
    with use_backend(backend):
        for function in (attention, attention_taylor):
            torch.testing.assert_close(function((huge, huge)), function((4, 5)))
            torch.testing.assert_close(function((huge, 2), (3, 1)), function((4, 2), (3, 1)))
            torch.testing.assert_close(function((huge, 2), (huge - 1, 1)), function((4, 2), (0, 1)))
        torch.testing.assert_close(embedding(stride=huge), embedding(stride=8))
        torch.testing.assert_close(embedding(weight=point, dilation=huge), embedding(weight=point))
        for norm_weight in (torch.ones(12), None):
            merged = merging(stride=huge, norm_weight=norm_weight)
            torch.testing.assert_close(merged, merging(stride=4, norm_weight=norm_weight))


@pytest.mark.parametrize("window", [(7, 6), (4, 9), (6, 2), (9, 5)])
def test_windows_larger_than_the_map_keep_shift_and_bias(window: tuple[int, int]) -> None:
    """As where the map is padded, which the reference does; a bias may be that of the window or of the map."""
    from asvit_fast.ops.window_attention import window_attention_reference

    qkv, tokens = QKV.double(), window[0] * window[1]
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, tokens, tokens, dtype=torch.float64, generator=generator).requires_grad_()
    cotangent = torch.randn(1, 4, 5, 4, dtype=torch.float64, generator=generator)
    for shift in [(0, 0), (1, 1), (window[0] - 1, 0), (0, window[1] - 1), (3, 1)]:
        want = window_attention_reference([qkv], 2, list(window), list(shift), bias)
        (to_bias,) = torch.autograd.grad(want, bias, cotangent)
        got = attention(window, shift, qkv=qkv, bias=bias)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, bias, cotangent)[0], to_bias)
        torch.testing.assert_close(attention_taylor(window, shift, qkv=qkv[None], bias=bias)[0], want)
    size = (min(window[0], 4), min(window[1], 5))
    of_map = bias.detach()[:, : size[0] * size[1], : size[0] * size[1]].contiguous()
    torch.testing.assert_close(attention(window, qkv=qkv, bias=of_map), attention(size, qkv=qkv, bias=of_map))


# --------------------------------------------------------------------------- queries without keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["masked", "timm", "torchvision"])
@needs_extension
def test_masked_queries(layout: str, dtype: torch.dtype) -> None:
    """Rows of the lowest number, which are uniform, and of -inf, which are NaN: values and gradients, where they are
    and where not."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for lowest in (torch.finfo(dtype).min, float("-inf")):
        for tokens in (12, 320):  # a window that is small, and one of several tiles
            window, size = ((3, 4), (5, 6)) if tokens == 12 else ((16, 20), (17, 21))
            bias, qkv, attn_scale, cotangent = new(2, tokens, tokens), new(1, *size, 12), new(2), new(1, *size, 4)
            bias[:, 4] = lowest
            bias[0, 3, 2:] = lowest
            bias[1, 7, : tokens - 2] = lowest  # all of the first tiles
            results = []
            for backend in ("cpu", "reference"):
                leaves = [tensor.clone().requires_grad_() for tensor in (qkv, bias, attn_scale)]
                with use_backend(backend):
                    y = attention(window, (1, 2), qkv=leaves[0], bias=leaves[1], layout=layout, attn_scale=leaves[2])
                    results.append([y, *torch.autograd.grad(y, leaves, cotangent)])
            tolerance = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 5, equal_nan=True)
            assert results[0][0].isnan().any() == (lowest == float("-inf"))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_masked_query_attends_all_keys_alike(dtype: torch.dtype) -> None:
    bias = torch.zeros(2, 20, 20, dtype=dtype)
    bias[:, 7] = torch.finfo(dtype).min
    values = QKV.to(dtype)[..., 8:].double().mean((1, 2))[0]
    results = [
        attention((4, 5), qkv=QKV.to(dtype), bias=bias)[0],
        attention((4, 5), qkv=QKV.to(torch.float32), bias=bias)[0],  # a bias that is wider than the scores, or narrower
        attention((4, 5), qkv=QKV.to(torch.float64), bias=bias)[0],
    ]
    if dtype != torch.float16:  # beside whose lowest number scores are not small
        results.append(attention_taylor((4, 5), qkv=STACK.to(dtype), bias=bias)[0, 0])
    for y in results:
        torch.testing.assert_close(y[1, 2].double(), values, rtol=1e-2, atol=1e-2)


# --------------------------------------------------------------------------- below the public functions


def test_a_meta_parameter_is_not_read_as_memory() -> None:
    """The custom ops themselves: torch sends such a call to their fake implementation."""
    bias = torch.zeros(2, 4, 4, device="meta")
    arguments = (None, None, bias, None, None, None, 2, [2, 2], [0, 0], [2, 2], 0.5, "masked", 0.0)
    with pytest.raises(af.InputError, match="bias must be on cpu, got one on meta"):
        torch.ops.asvit_fast.window_attention(QKV, *arguments)
    with pytest.raises(af.InputError, match="norm_weight must be on cpu"):
        torch.ops.asvit_fast.patch_merge(TOKENS, MERGE, torch.ones(12, device="meta"), None, None, 2, 2, 1e-5, False)
    with pytest.raises(af.InputError, match="weight must be on cpu"):
        torch.ops.asvit_fast.linear(SMALL, FEATURES.to("meta"), None, None, "none")
    with pytest.raises(af.InputError, match="bias must be on cpu"):
        torch.ops.asvit_fast.gelu_taylor(ROWS, "none", torch.zeros(12, device="meta"))


@needs_extension
def test_compiled_ops_check_what_they_read() -> None:
    compiled = torch.ops.asvit_fast_C
    attend = (QKV, *[None] * 6, 2, [2, 2], [0, 0], [], 0.5, "masked")
    output, statistics = compiled.window_attention(*attend)
    backward = (output, output, statistics, *attend, [False] * 7)
    merge = (TOKENS, MERGE, 2, 2, torch.ones(12), None)
    merged, moments = compiled.patch_merge(*merge, None, 1e-5, False, [0] * 4)
    merged_backward = (merged, TOKENS, MERGE, moments, 2, 2, torch.ones(12), None, 1e-5, False, [0] * 4, True, True)
    embed = (IMAGE, PATCHES, None, None, None, 1, 1, [0] * 4, 1e-5)
    tokens = compiled.patch_embed(*embed, torch.float32, False)[0]

    def wrong(op: Callable[..., object], arguments: tuple, index: int, *values: object) -> None:
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                op(*arguments[:index], value, *arguments[index + 1 :])

    windows = ([2**31, 2**31], [2**32, 2**32], [2**62, 4], [0, 2], [2], [2, 2, 2], [2, 2, 2, 2])
    wrong(compiled.window_attention, attend, 8, *windows)
    wrong(compiled.window_attention, attend, 10, [4], [3, 2], [1, 2], [2**31, 2**31], [2**62, 2], [4, 4, 4])
    wrong(compiled.window_attention, attend, 1, QKV, QKV[..., :4])
    wrong(compiled.window_attention, attend, 3, torch.zeros(2, 4, 4).int(), torch.zeros(2, 4, 1))
    for index in (5, 6):
        wrong(compiled.window_attention, attend, index, torch.zeros(3), torch.zeros(2).int())
    for index in (0, 1):
        wrong(compiled.window_attention_backward, backward, index, output[:, :1], output[..., :2])
    wrong(compiled.window_attention_backward, backward, 2, statistics[:1], statistics.double(), statistics[..., :1])
    wrong(compiled.window_attention_backward, backward, 16, [False] * 3, [True] * 7)
    wrong(compiled.patch_merge, (*merge, None, 1e-5, False, [0] * 4), 2, 2**31, 2**32, 2**62, 0, 3)
    wrong(compiled.patch_merge, (*merge, None, 1e-5, False, [0] * 4), 6, torch.zeros(3), torch.zeros(2).int())
    wrong(compiled.patch_merge, (*merge, None, 1e-5, False, [0] * 4), 9, [0] * 3, [-1, 0, 0, 0], [2**62] * 4)
    wrong(compiled.patch_merge_backward, merged_backward, 0, merged[:, :1], merged[..., :1], merged.int())
    wrong(compiled.patch_merge_backward, merged_backward, 3, moments[:1], moments.double(), moments[:, :, :1])
    wrong(compiled.patch_embed, (*embed, torch.float32, False), 5, 0, 2**31, 2**62)
    wrong(compiled.patch_embed, (*embed, torch.float32, False), 6, 0, 4, 2**31, 2**62)
    wrong(compiled.patch_embed, (*embed, torch.float32, False), 7, [2**62] * 4, [-1, 0, 0, 0], [0])
    wrong(compiled.patch_embed_backward, (tokens, *embed, torch.zeros(0), True, True), 0, tokens[:, 1:], tokens.int())
    wrong(compiled.gelu_taylor, (ROWS, "none", None), 2, torch.zeros(11), torch.zeros(12).int())
    wrong(compiled.layer_norm_taylor, (ROWS, None, None, 1e-5), 1, torch.zeros(()), torch.zeros(12).bool())
    nothing = compiled.patch_merge_backward(
        merged[:0], TOKENS[:0], MERGE, moments[:, :0].contiguous(), *merged_backward[4:]
    )
    assert [tensor.abs().sum().item() for tensor in nothing] == [0.0] * 5


# --------------------------------------------------------------------------- linear


@needs_extension
@pytest.mark.parametrize("x", [LARGE, SMALL], ids=["large", "small"])
def test_linear_takes_what_torch_takes(x: Tensor) -> None:
    x, weight = x + torch.linspace(0, 1, x.numel()).reshape(x.shape), FEATURES * torch.linspace(0, 1, 32)[:, None]
    column = torch.linspace(-1, 1, 32)
    biases = [None, torch.tensor(2.0), torch.ones(1), torch.ones(1, 1), column, column[None], torch.ones(1).expand(32)]
    for bias in [*biases, torch.linspace(-1, 1, len(x))[:, None], torch.linspace(-1, 1, 64)[::2]]:
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    for y in (x[:, None], x.reshape(1, -1, 1, 64), x[::2], x[:1].expand(len(x), 64), x.T.contiguous().T):
        torch.testing.assert_close(ops.linear(y, weight, column), F.linear(y, weight, column), rtol=1e-4, atol=1e-4)
    for other in (weight[:1].expand(32, 64), weight.T.contiguous().T):
        torch.testing.assert_close(ops.linear(x, other, column), F.linear(x, other, column), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ops.linear(x, weight[0]), F.linear(x, weight[0]), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- checked once


def test_arguments_are_checked_again_where_they_look_different() -> None:
    """After a call that passed, with what equals its arguments but is not of their type, shape, dtype or device."""
    qkv, bias = torch.randn(1, 4, 4, 12), torch.randn(1, 1, 1)
    for _ in range(2):
        ops.window_attention(qkv, 1, (1, 1), (0, 0), bias)
        ops.window_attention(qkv, 2, [2, 2], [1, 1])
    wrong: list[tuple[object, ...]] = [
        (qkv, 1, (True, 1), (0, 0), bias),
        (qkv, True, (1, 1), (0, 0), bias),
        (qkv, 1, (1, 1), (0, False), bias),
        (qkv, 2, [2.0, 2], [1, 1]),
        (qkv, 1, (1, 1), (0, 0), bias.int()),
        (qkv, 1, (1, 1), (0, 0), bias.to("meta")),
        (qkv, 1, (1, 1), (0, 0), bias.expand(2, 1, 1)),
        (qkv.long(), 2, [2, 2], [1, 1]),
        (qkv, 2, [2, 2], [1, 1], None, float("nan")),
    ]
    for arguments in wrong * 2:
        with pytest.raises(af.InputError):
            ops.window_attention(*arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        assert ops.window_attention(qkv, np.int64(2), (np.int64(2), 2), (1, 1)).shape == (1, 4, 4, 4)


NO_TENSORS: dict[str, Callable[[object], Tensor]] = {
    "window_attention: qkv": lambda x: attention(qkv=x),
    "window_attention: bias": lambda x: attention(bias=x),
    "window_attention: padding": lambda x: attention(layout="timm", padding=x),
    "window_attention: v": lambda x: attention(qkv=(QKV[..., :4], QKV[..., :4], x)),
    "window_attention_taylor: qkv": lambda x: attention_taylor(qkv=x),
    "position_bias: table": lambda x: ops.position_bias(x, torch.zeros(2, 2, dtype=torch.int64)),
    "position_bias: index": lambda x: ops.position_bias(torch.ones(3, 2), x),
    "patch_embed: image": lambda x: ops.patch_embed(x, PATCHES, None, 4, 1, (0, 0, 0, 0)),
    "patch_embed: weight": lambda x: ops.patch_embed(IMAGE, x, None, 4, 1, (0, 0, 0, 0)),
    "patch_embed: norm_weight": lambda x: ops.patch_embed(IMAGE, PATCHES, None, 4, 1, (0, 0, 0, 0), x),
    "patch_merge: x": lambda x: ops.patch_merge(x, MERGE, 2, 2),
    "patch_merge: weight": lambda x: ops.patch_merge(TOKENS, x, 2, 2),
    "linear: x": lambda x: ops.linear(x, FEATURES),
    "linear: weight": lambda x: ops.linear(SMALL, x),
    "gelu_taylor: x": lambda x: ops.gelu_taylor(x),
    "softmax_taylor: x": lambda x: ops.softmax_taylor(x),
}


@pytest.mark.parametrize("name", NO_TENSORS)
def test_what_is_no_tensor(name: str) -> None:
    for value in (np.ones((1, 4, 4, 12)), 1.0):
        with pytest.raises(af.InputError, match=f"{name} must be a tensor, got {type(value).__name__}"):
            NO_TENSORS[name](value)


def test_a_scale_without_axes() -> None:
    with pytest.raises(af.InputError, match=r"scale must be a Python number, or a tensor \[2\]"):
        attention(scale=torch.ones(()))
