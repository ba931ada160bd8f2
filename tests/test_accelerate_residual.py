"""Blocks whose sums are made in products: the same numbers, and nobody who looks at a module is left out."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from family_checks import prepared
from stacked import needs_extension
from tiny_swin import images, swin
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration import chunked_mlp, residual
from asvit_fast.ops import packed_linear

linear_module = importlib.import_module("asvit_fast.ops.linear")
pytestmark = [needs_extension, pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")]


def as_vit() -> nn.Module:
    return af.create_model("4,2,2,2|2,1,2|2,1,2|2,1,2|8", img_size=64, num_classes=3, drop_path_rate=0.1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "swin": (swin, images),
    "as-vit": (as_vit, lambda: torch.randn(2, 3, 64, 64)),
}


@pytest.fixture(params=[packed_linear.OWN, packed_linear.ONEDNN])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both libraries, for products of every size."""
    monkeypatch.setattr(linear_module, "SMALL", 0)
    monkeypatch.setattr(linear_module, "SMALL_FOR_OURS", 0)
    for module in (packed_linear, linear_module, residual, chunked_mlp):
        monkeypatch.setattr(module, "library", lambda dtype: request.param if dtype == torch.float32 else None)
    return request.param


def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every sum that is made in a product."""
    calls: list[int] = []
    product = packed_linear.product

    def counted(*arguments: object, **options: object) -> Tensor:
        calls.extend([1] * (len(arguments) > 4 and arguments[4] is not None))
        return product(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_module, "product", counted)
    return calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_same_numbers(name: str, mode: Callable[[], object], of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, sample = MODELS[name]
    model = prepared(make).eval()
    x, source = sample(), copy.deepcopy(model).double()
    af.accelerate(model, strict=True)
    calls = joined(monkeypatch)
    with mode():
        torch.testing.assert_close(model(x).double(), source(x.double()), rtol=1e-4, atol=1e-5)
    blocks = sum(type(module).__name__ in ("FastSwinTransformerBlock", "FastBlock") for module in model.modules())
    assert len(calls) == 2 * blocks
    calls.clear()
    model(x)  # records gradients
    assert not calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("path", ["norm1", "norm2", "mlp", "mlp.act", "mlp.fc2", "drop_path1", "drop_path2", "attn"])
def test_hooks_see_their_module(name: str, path: str, of: str) -> None:
    make, sample = MODELS[name]
    model = prepared(make).eval()
    x, source = sample(), copy.deepcopy(model)
    af.accelerate(model)
    seen: dict[str, Tensor] = {}
    for key, one in (("ours", model), ("source", source)):
        stages = one.get_submodule("layers" if name == "swin" else "stages")
        block = stages[0].blocks[-1]  # type: ignore[index]
        block.get_submodule(path).register_forward_hook(lambda m, args, y, key=key: seen.__setitem__(key, y))
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["ours"], seen["source"], rtol=1e-4, atol=1e-5)


def test_a_replaced_forward_runs(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stochastic depth, of a layer, and of the class of the block."""
    model = prepared(swin).eval()
    af.accelerate(model)
    block = model.layers[0].blocks[1]  # type: ignore[index, union-attr]
    with torch.no_grad():
        before = model(images())
        with monkeypatch.context() as patch:
            patch.setattr(block.drop_path1, "forward", lambda x: 0 * x, raising=False)
            assert not torch.allclose(model(images()), before)
        with monkeypatch.context() as patch:
            patch.setattr(block.mlp.fc2, "forward", lambda x: 0 * x[..., :16], raising=False)
            assert not torch.allclose(model(images()), before)
        with monkeypatch.context() as patch:
            patch.setattr(type(block).source, "forward", lambda self, x: x)
            assert not torch.allclose(model(images()), before)
        torch.testing.assert_close(model(images()), before)
