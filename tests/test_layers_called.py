"""Layers of As-ViT's embedding and merging that an op reads instead of calling: called, where somebody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.errors import InputError
from asvit_fast.nn import OverlapPatchEmbed, PatchMerging


class LowRank(nn.Module):
    """An adapter as LoRA's: the layer and something beside it; its weight is the layer's."""

    def __init__(self, layer: Any, beside: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside = layer, beside
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.beside(x)


CASES: list[tuple[Callable[[], Any], tuple[int, ...], str]] = [
    (lambda: PatchMerging(3, 4, 8), (2, 7, 9, 4), "reduction"),
    (lambda: PatchMerging(2, 4, 8, norm=False), (2, 8, 8, 4), "reduction"),
    (lambda: OverlapPatchEmbed(7, 8), (2, 3, 29, 34), "proj"),
    (lambda: OverlapPatchEmbed(4, 8, norm=False), (2, 3, 32, 32), "proj"),
]


@pytest.mark.parametrize(("make", "shape", "name"), CASES, ids=["merge", "merge plain", "embed", "embed plain"])
def test_an_adapter_is_called(make: Callable[[], Any], shape: tuple[int, ...], name: str) -> None:
    module, x = make(), torch.randn(shape)
    layer = getattr(module, name)
    beside = type(layer)(*_arguments(layer), bias=False)
    merged = make()
    merged.load_state_dict(module.state_dict())
    with torch.no_grad():
        getattr(merged, name).weight += beside.weight
    expected = merged(x)
    setattr(module, name, LowRank(layer, beside))
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert beside.weight.grad is not None


def _arguments(layer: Any) -> tuple[Any, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride


@pytest.mark.parametrize(("make", "shape", "name"), CASES, ids=["merge", "merge plain", "embed", "embed plain"])
def test_a_hook_sees_the_call(make: Callable[[], Any], shape: tuple[int, ...], name: str) -> None:
    module, x = make(), torch.randn(shape)
    expected = module(x)
    for part in {name, "norm"} & set(dict(module.named_children())):
        seen: list[Any] = []
        handle = getattr(module, part).register_forward_hook(lambda *call, seen=seen: seen.append(call))
        torch.testing.assert_close(module(x), expected)
        assert len(seen) == 1
        handle.remove()
    assert torch.equal(module(x), expected)


def test_coarse_tokens_need_the_plain_layer() -> None:
    module = OverlapPatchEmbed(4, 8)
    module.set_token_reduction(2)
    module.proj.register_forward_hook(lambda *call: None)
    with pytest.raises(InputError, match="plain Conv2d"):
        module(torch.randn(1, 3, 32, 32))


def test_quantised_by_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, x = af.create_model("asvit_seed", img_size=32).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        found = model(x)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
