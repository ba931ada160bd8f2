"""MONAI's SwinUNETR against its source on the same weights, images and volumes.

Needs ``pip install -e .[integrations]``.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from family_checks import Model, check_float64, check_swapped, prepared, sample
from test_accelerate_versions import check_declared_attributes, check_renamed_attributes, files_of
from tiny_swin import close, needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration import FAMILIES, shift_masks

swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr")
pytest.importorskip("einops")
pytestmark = needs_kernels
FLASH = "use_flash_attention" in inspect.signature(swin_unetr.SwinTransformer).parameters


def encoder(axes: int, **kwargs: Any) -> nn.Module:
    if kwargs.get("use_flash_attention") and not FLASH:
        pytest.skip("this version of MONAI has no use_flash_attention")
    small = {"in_chans": 1, "embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
    sides = {"window_size": (3,) * axes, "patch_size": (2,) * axes, "spatial_dims": axes}
    return swin_unetr.SwinTransformer(**small, **sides, **kwargs)


COMMON = {"FastSwinUNETRBlock", "FastSwinUNETRStage", "FastMonaiMLP"}
MERGING, MERGING_V2 = {"FastSwinUNETRPatchMerging"}, {"FastSwinUNETRPatchMergingV2"}
# name: model, shape of its input, classes that have to be there afterwards
MODELS: dict[str, Model] = {
    "images": (lambda: encoder(2), (2, 1, 48, 48), COMMON | MERGING),
    "images padded": (lambda: encoder(2), (2, 1, 44, 58), COMMON | MERGING),
    "images mergingv2": (lambda: encoder(2, downsample="mergingv2"), (2, 1, 44, 58), COMMON | MERGING_V2),
    "images flash": (lambda: encoder(2, use_flash_attention=True), (2, 1, 44, 58), COMMON),
    "volumes": (lambda: encoder(3), (2, 1, 24, 24, 24), COMMON),
    "volumes padded": (lambda: encoder(3), (1, 1, 16, 14, 22), COMMON),
    "volumes clipped": (lambda: encoder(3), (1, 1, 4, 14, 22), COMMON),
    "volumes mergingv2": (lambda: encoder(3, downsample="mergingv2"), (1, 1, 16, 14, 22), COMMON),
    "volumes v2": (lambda: encoder(3, use_v2=True), (1, 1, 32, 32, 32), COMMON),
    "volumes checkpoint": (lambda: encoder(3, use_checkpoint=True), (1, 1, 16, 14, 22), COMMON),
    "volumes flash": (lambda: encoder(3, use_flash_attention=True), (1, 1, 16, 14, 22), COMMON),
}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_notified", set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    if name == "volumes v2" and dtype == torch.bfloat16:
        pytest.skip("torch's convolutions of so few voxels have gradients of 1e38 in bfloat16, MONAI's as ours")
    check_swapped(MODELS[name], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_rounding_in_float64(name: str) -> None:
    check_float64(MODELS[name])


def test_autocast() -> None:
    make, shape, _ = MODELS["volumes padded"]
    model = prepared(make)
    af.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = af.verify(model, sample(shape), rows=0)
    assert result.ok, result.table()


def test_every_family_is_tested() -> None:
    tested = set().union(*(classes for _, _, classes in MODELS.values()))
    families = [family for family in FAMILIES if family.source.startswith("monai.") and family.replacement]
    assert {str(family.replacement).rpartition(".")[2] for family in families} == tested


@pytest.mark.parametrize("name", ["images", "images mergingv2"])
def test_a_renamed_attribute_is_a_version_that_is_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_renamed_attributes(MODELS[name][0], monkeypatch)


@pytest.mark.parametrize("file", files_of("monai"))
def test_attributes_that_are_read_are_declared(file: str) -> None:
    check_declared_attributes(file)


def test_whole_network() -> None:
    model = swin_unetr.SwinUNETR(
        in_channels=1, out_channels=2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), spatial_dims=2
    )
    model = prepared(lambda: model).eval()
    x = sample((1, 1, 64, 64))
    with torch.no_grad():
        expected = model(x)
        af.accelerate(model, strict=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- masks


def count_masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every mask that is made, by MONAI or by us."""
    calls: list[int] = []
    for owner, name in ((swin_unetr, "compute_mask"), (shift_masks, "window_mask")):
        source = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, source=source: calls.append(1) or source(*args))
    return calls


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(lambda: encoder(3)).eval()
    af.accelerate(model)
    calls = count_masks(monkeypatch)
    model(sample((1, 1, 16, 14, 22)))
    assert calls == []


def test_a_block_that_runs_as_before_gets_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(lambda: encoder(3)).eval()
    x = sample((1, 1, 16, 14, 22))
    expected = model(x)
    af.accelerate(model)
    model.layers1[0].blocks[1].attn.register_forward_hook(lambda *args: None)
    calls = count_masks(monkeypatch)
    with pytest.warns(backends.FallbackWarning, match="its attn has a forward hook"):
        actual = model(x)
    assert calls == [1]
    for fast, source in zip(actual, expected, strict=True):
        close(fast, source)


def test_masks_are_handed_in_where_somebody_may_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of the shift is recognised by its numbers, once for each size, and dropped."""
    model = prepared(lambda: encoder(3)).eval()
    x = sample((1, 1, 16, 14, 22))
    expected = model(x)
    seen: list[Any] = []
    model.layers1[0].blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    report = af.accelerate(model)
    assert [decision.reason for decision in report.left] == ["its blocks.1 has a forward pre-hook"]
    actual = model(x)
    assert isinstance(seen[0], Tensor)
    for fast, source in zip(actual, expected, strict=True):
        close(fast, source)


def test_another_mask_runs_the_source() -> None:
    model = prepared(lambda: encoder(3)).eval()
    block = model.layers1[0].blocks[1]
    x = sample((1, 6, 6, 9, 8))
    size, window, shift = (6, 6, 9), (3, 3, 3), (1, 1, 1)
    mask = swin_unetr.compute_mask(size, window, shift, x.device)
    other = mask.flip(0)
    expected = block(x, mask), block(x, other)
    af.accelerate(model)
    close(block(x, mask), expected[0])
    with pytest.warns(backends.FallbackWarning, match="the mask that it is called with is not that of its shift"):
        close(block(x, other), expected[1])


def test_attention_dropout_runs_the_source() -> None:
    model = prepared(lambda: encoder(2, attn_drop_rate=0.5)).train()
    x = sample((1, 1, 44, 58))
    torch.manual_seed(0)
    expected = model(x)
    af.accelerate(model)
    torch.manual_seed(0)
    with pytest.warns(backends.FallbackWarning, match="dropout"):
        actual = model(x)
    for fast, source in zip(actual, expected, strict=True):
        close(fast, source)


def test_dropout_of_the_same_seed_is_the_same() -> None:
    model = prepared(lambda: encoder(3, drop_rate=0.5)).train()
    x = sample((1, 1, 16, 14, 22))
    torch.manual_seed(0)
    expected = model(x)
    af.accelerate(model)
    torch.manual_seed(0)
    for fast, source in zip(model(x), expected, strict=True):
        close(fast, source)


def test_compiled() -> None:
    model = prepared(lambda: encoder(3)).eval()
    x = sample((1, 1, 16, 14, 22))
    with torch.no_grad():
        stage = model.layers1[0]
        features = model.patch_embed(x)
        expected = stage(features)
        af.accelerate(model)
        close(torch.compile(stage, backend="aot_eager", fullgraph=True)(features), expected)
