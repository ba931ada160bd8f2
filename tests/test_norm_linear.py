"""LayerNorm in the product after it: the kernel for every instruction set, and when it runs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from stacked import every_isa, needs_extension
from tiny_swin import images, swin
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration.norm_linear import linear_of_norm
from asvit_fast.ops import packed_linear

module = importlib.import_module("asvit_fast.ops.linear")
pytestmark = needs_extension

SHAPES = [(1, 1, 1), (5, 7, 3), (13, 300, 37), (64, 96, 88), (400, 17, 130), (770, 96, 16), (3, 1026, 9), (0, 8, 4)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def compiled(x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    packed = torch.ops.asvit_fast_C.linear_pack(weight)
    return torch.ops.asvit_fast_C.norm_linear(x, *norm, EPS, packed, weight.shape[0], bias, activation)


def reference(x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return module.linear_reference(F.layer_norm(x, x.shape[-1:], *norm, EPS), weight, bias, activation)


def operands(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs) * torch.logspace(-2, 3, rows)[:, None] + 5  # rows of all sizes
    norm = 1 + torch.randn(inputs) / 4, torch.randn(inputs)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    return x.to(dtype), (norm[0].to(dtype), norm[1].to(dtype)), weight.to(dtype), bias.to(dtype)


@every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, activation: str, isa: str, poison_empty: None) -> None:
    x, norm, weight, bias = operands(*shape, dtype)
    for one in (None, bias):
        wide = None if one is None else one.double()
        exact = reference(x.double(), (norm[0].double(), norm[1].double()), weight.double(), wide, activation)
        found, eager = compiled(x, norm, weight, one, activation), reference(x, norm, weight, one, activation)
        assert found.dtype == dtype
        assert_accurate(f"{shape} {dtype}", found, eager, exact)


@every_isa
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strides_leading_axes_and_threads(dtype: torch.dtype, isa: str) -> None:
    x, norm, weight, bias = operands(400, 64, 80, dtype)
    want = compiled(x, norm, weight, bias, "gelu")
    gaps = torch.full((400, 2, 66), float("nan"), dtype=dtype)
    gaps[:, 1, 1:-1] = x
    turned = x.t().contiguous().t()
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for same in (x, gaps[:, 1, 1:-1], turned):
            assert torch.equal(compiled(same, norm, weight, bias, "gelu"), want)
        assert torch.equal(compiled(x.view(4, 10, 10, 64), norm, weight, bias, "gelu").view(400, 80), want)
    torch.set_num_threads(before)


def test_what_does_not_fit_is_named() -> None:
    x, norm, weight, bias = operands(4, 8, 3, torch.float32)
    packed = torch.ops.asvit_fast_C.linear_pack(weight)
    call = torch.ops.asvit_fast_C.norm_linear
    for arguments, text in (
        ((x, norm[0][:7], norm[1], EPS, packed, 3, bias, "none"), r"norm_weight must be \[8\], not \[7\]"),
        ((x, norm[0], norm[1][:7], EPS, packed, 3, bias, "none"), r"norm_bias must be \[8\]"),
        ((x, *norm, EPS, packed, 3, bias[:2], "none"), r"bias must be \[3\]"),
        ((x, *norm, EPS, packed, 3, bias, "relu"), "activation"),
        ((x, *norm, EPS, packed, 50, None, "none"), "packed is not"),
        ((x.double(), *norm, EPS, packed, 3, bias, "none"), "float"),
    ):
        with pytest.raises(ValueError, match=text):
            call(*arguments)


# --------------------------------------------------------------------------- when it runs


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.LayerNorm, nn.Linear, Tensor]:
    """On any processor, of any size."""
    monkeypatch.setattr(module, "SMALL_FOR_OURS", 0)
    choose = lambda dtype: packed_linear.OWN if dtype == torch.float32 else None  # noqa: E731
    monkeypatch.setattr(module, "library", choose)
    torch.manual_seed(0)
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, nn.Linear(24, 32), torch.randn(2, 30, 24)


def fused(norm: nn.Module, x: Tensor, layer: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether `linear_of_norm` takes the kernel; its numbers are checked."""
    calls = []
    original = module.product
    monkeypatch.setattr(module, "product", lambda *args, **kw: calls.append(kw.get("norm")) or original(*args, **kw))
    found = linear_of_norm(norm, x, layer, "gelu")
    monkeypatch.setattr(module, "product", original)
    torch.testing.assert_close(found, F.gelu(layer(norm(x))), rtol=1e-4, atol=1e-4)
    return any(norm is not None for norm in calls)


Layers = tuple[nn.LayerNorm, nn.Linear, Tensor]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_inference(mode: Callable[[], torch.no_grad], layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, layer, x = layers
    assert not fused(norm, x, layer, monkeypatch)  # gradients are recorded
    with mode():
        assert fused(norm, x, layer, monkeypatch)
        own = timm.layers.LayerNorm(24)
        assert fused(own, x, layer, monkeypatch)
        norm.weight.mul_(2), norm.bias.data[3].add_(1)  # are looked at in every call
        assert fused(norm, x, layer, monkeypatch)


def test_not_for_others(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, layer, x = layers

    class Own(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with torch.no_grad():
        others: list[nn.Module] = [
            nn.Identity(), nn.LayerNorm(24, bias=False), nn.LayerNorm(24, elementwise_affine=False), Own(24),
            nn.LayerNorm((30, 24)), timm.layers.LayerNormFp32(24),
        ]  # fmt: skip
        assert not any(fused(other, x, layer, monkeypatch) for other in others)
        fast = timm.layers.LayerNorm(24)
        fast._fast_norm = True
        assert not fused(fast, x, layer, monkeypatch)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear_of_norm(norm, x, layer).dtype == torch.bfloat16
        seen = []
        norm.register_forward_hook(lambda *_: seen.append(1))
        assert not fused(norm, x, layer, monkeypatch) and seen


def test_a_replaced_forward_of_the_class_runs(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, layer, x = layers
    original = nn.LayerNorm.forward
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(nn.LayerNorm, "forward", lambda self, x: 2 * original(self, x))
        assert not fused(norm, x, layer, monkeypatch)
    with torch.no_grad():
        assert fused(norm, x, layer, monkeypatch)
        norm.normalized_shape = (12,)  # which torch refuses
        with pytest.raises(RuntimeError):
            linear_of_norm(norm, x, layer)


@every_isa
def test_what_overflows_is_seen(isa: str) -> None:
    _, norm, weight, bias = operands(40, 96, 8, torch.float32)
    for scale in (1e20, 1e30):
        assert compiled(torch.randn(40, 96) * scale, norm, weight, bias, "none").isnan().any(1).all()


class OverTokens(nn.Module):
    """Looks at all tokens of an image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", ["module", "hook"])
def test_a_norm_sees_all_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the feed-forward network after it takes them in parts."""
    from asvit_fast.acceleration import chunked_mlp

    monkeypatch.setattr(chunked_mlp, "LARGE", 0)
    monkeypatch.setattr(chunked_mlp, "LARGE_OF_OURS", 0)
    monkeypatch.setattr(chunked_mlp, "PART", 4096)
    torch.manual_seed(0)
    model, x = swin().eval(), images()
    for block in (block for stage in model.layers for block in stage.blocks):  # type: ignore[union-attr]
        if kind == "module":
            block.norm2 = OverTokens(block.norm2.normalized_shape[0])
        else:
            block.norm2.register_forward_hook(lambda m, args, y: y - y.mean(1, keepdim=True))
    source = copy.deepcopy(model).double()
    af.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), source(x.double()), rtol=1e-4, atol=1e-5)


def test_a_feed_forward_network_of_nothing() -> None:
    model, x = swin().eval(), images()
    for block in (block for stage in model.layers for block in stage.blocks):  # type: ignore[union-attr]
        block.mlp.fc1 = block.mlp.act = block.mlp.fc2 = nn.Identity()
    source = copy.deepcopy(model)
    af.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_networks(dtype: torch.dtype) -> None:
    """Blocks of As-ViT and of timm's Swin give what their sources give."""
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    for model, size in ((af.create_model("asvit_seed", img_size=64, num_classes=5), 64), (swin, 224)):
        model, x = model.eval().to(dtype), torch.randn(1, 3, size, size, dtype=dtype)
        af.accelerate(model)
        assert af.verify(model, x).ok
