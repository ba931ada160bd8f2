"""Every family that ``accelerate`` knows against its source on the same weights: outputs and all gradients."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision.models.swin_transformer as torchvision_swin
import torchvision.models.video.swin_transformer as torchvision_video
from family_checks import check_float64, fast_classes, prepared
from timm.layers import PatchEmbed
from timm.models import davit, nest, pvt_v2, swin_transformer_v2, swin_transformer_v2_cr, tiny_vit, twins
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration import FAMILIES, families_table

pytestmark = needs_kernels
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 3}


def swin(size: int, name: str = "swin_tiny_patch4_window7_224", **kwargs) -> nn.Module:
    return timm.create_model(name, img_size=size, **SWIN, **kwargs)


def swin_v2(size: int, **kwargs) -> nn.Module:
    kwargs = {"window_size": 4} | kwargs
    return swin_transformer_v2.SwinTransformerV2(img_size=size, **SWIN, **kwargs)


def separate_bias(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, swin_transformer_v2.WindowAttention):
            module.qkv_bias_separate = True
    return model


def swin_v2_cr(size: int) -> nn.Module:
    return swin_transformer_v2_cr.SwinTransformerV2Cr(img_size=size, window_size=4, **SWIN)


def maxvit(size: int, name: str = "maxvit_tiny_tf_224", **kwargs) -> nn.Module:
    blocks = ("PM", "PM") if "pm" in name else ("M", "M")
    return timm.create_model(
        name, img_size=size, embed_dim=(32, 64), depths=(1, 1), block_type=blocks, stem_width=8, num_classes=3, **kwargs
    )


def tiny_vit_model() -> nn.Module:
    return tiny_vit.TinyVit(
        embed_dims=(16, 16, 32), depths=(1, 1, 1), num_heads=(1, 2, 2), window_sizes=(7, 4, 4), num_classes=3
    )


def davit_model() -> nn.Module:
    return davit.DaVit(embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=3)


def twins_model(size: int) -> nn.Module:
    return twins.Twins(
        img_size=size,
        embed_dims=(16, 32),
        num_heads=(2, 4),
        mlp_ratios=(2, 2),
        depths=(2, 2),
        wss=(4, 4),
        num_classes=3,
    )


def nest_model() -> nn.Module:
    return nest.Nest(
        img_size=64, num_levels=2, embed_dims=(16, 32), num_heads=(2, 4), depths=(1, 1), num_classes=3, mlp_ratio=2
    )


def pvt_model() -> nn.Module:
    return pvt_v2.PyramidVisionTransformerV2(
        depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), sr_ratios=(4, 2), mlp_ratios=(2, 2), num_classes=3
    )


def video_model() -> nn.Module:
    return torchvision_video.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 3, 3], num_classes=3)


def torchvision_model(version: int, window: int) -> nn.Module:
    block = torchvision_swin.SwinTransformerBlock if version == 1 else torchvision_swin.SwinTransformerBlockV2
    merging = torchvision_swin.PatchMerging if version == 1 else torchvision_swin.PatchMergingV2
    return torchvision_swin.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [window, window], num_classes=3, block=block, downsample_layer=merging
    )


# windows that do not divide the map: Swin V2 pads since timm 1.0.31
V2_SIDE = 44 if tuple(int(part) for part in timm.__version__.split(".")[:3]) >= (1, 0, 31) else 32
FIRST = {"FastSwinTransformerBlock", "FastMlp", "FastPatchEmbed", "FastLinear"}
VIDEO = {"FastShiftedWindowAttention3d", "FastTorchvisionPatchMerging", "FastTorchvisionMLP"}


# name: model, sides of the image or video, classes that have to be there afterwards
def as_vit_model() -> nn.Module:
    return af.create_model("4,2,2,2|2,1,2|2,1,2|2,1,2|8", img_size=64, num_classes=3)


MODELS: dict[str, tuple[Callable[[], nn.Module], int | tuple[int, ...], set[str]]] = {
    "swin": (lambda: swin(56), 56, FIRST),
    "swin padded": (lambda: swin(44, window_size=4), 44, {"FastSwinTransformerBlock", "FastPatchMerging"}),
    "swin always partitioned": (
        lambda: swin(36, window_size=6, always_partition=True, strict_img_size=False),
        36,
        {"FastSwinTransformerBlock"},
    ),
    "swin other size": (
        lambda: swin(56, strict_img_size=False),
        52,
        {"FastSwinTransformerBlock"},
    ),
    "swin_s3": (lambda: swin(56, "swin_s3_tiny_224", window_size=(7, 5)), 56, {"FastSwinTransformerBlock"}),
    "swinv2": (lambda: swin_v2(32), 32, {"FastSwinTransformerV2Block"}),
    "swinv2 padded": (lambda: swin_v2(V2_SIDE), V2_SIDE, {"FastSwinTransformerV2Block"}),
    "swinv2 separate bias": (lambda: separate_bias(swin_v2(V2_SIDE)), V2_SIDE, {"FastSwinTransformerV2Block"}),
    "swinv2 no bias": (lambda: swin_v2(32, qkv_bias=False), 32, {"FastSwinTransformerV2Block"}),
    "swinv2_cr": (lambda: swin_v2_cr(V2_SIDE), V2_SIDE, {"FastSwinTransformerV2CrBlock"}),
    "maxvit tf": (lambda: maxvit(96), 96, {"FastPartitionAttentionCl"}),
    "maxvit rw": (lambda: maxvit(96, "maxvit_rmlp_pico_rw_256"), 96, {"FastPartitionAttentionCl"}),
    "maxvit parallel": (lambda: maxvit(96, "maxvit_tiny_pm_256"), 96, {"FastParallelPartitionAttention"}),
    "tiny_vit": (tiny_vit_model, 64, {"FastTinyVitBlock", "FastNormMlp"}),
    "tiny_vit padded": (tiny_vit_model, 76, {"FastTinyVitBlock"}),
    "davit": (davit_model, 32, {"FastSpatialBlock"}),
    "davit padded": (davit_model, 44, {"FastSpatialBlock"}),
    "twins": (lambda: twins_model(32), 32, {"FastLocallyGroupedAttn"}),
    "twins padded": (lambda: twins_model(40), 40, {"FastLocallyGroupedAttn"}),
    "nest": (nest_model, 64, {"FastNestAttention"}),
    "pvt_v2": (pvt_model, 40, {"FastOverlapPatchEmbed"}),
    "as-vit": (as_vit_model, 64, {"FastBlock"}),
    "torchvision": (
        lambda: torchvision_model(1, 4),
        32,
        {"FastShiftedWindowAttention", "FastTorchvisionPatchMerging", "FastTorchvisionMLP"},
    ),
    "torchvision padded": (lambda: torchvision_model(1, 7), 44, {"FastShiftedWindowAttention"}),
    "torchvision v2": (lambda: torchvision_model(2, 4), 32, {"FastShiftedWindowAttentionV2"}),
    "torchvision v2 padded": (lambda: torchvision_model(2, 7), 44, {"FastShiftedWindowAttentionV2"}),
    "torchvision3d": (video_model, (8, 24, 24), VIDEO),
    "torchvision3d padded": (video_model, (6, 40, 28), VIDEO),
    "torchvision3d clipped": (video_model, (2, 8, 28), VIDEO),
}


def image(size: int | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    sides = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name, dtype):
    make, size, expected = MODELS[name]
    model = prepared(make).to(dtype)
    af.accelerate(model, strict=True)
    assert expected - (set() if dtype == torch.float32 else {"FastLinear"}) <= fast_classes(model)
    result = af.verify(model, image(size, dtype), rows=0)
    if not result.ok:  # as torch's own operations in another order do for 1 of 24 images of the second torchvision's
        others = [af.verify(model, image(size, dtype).flip(axis), rows=0) for axis in (2, 3)]
        assert all(other.ok for other in others), result.table()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_rounding_in_float64(name):
    make, size, classes = MODELS[name]
    check_float64((make, tuple(image(size).shape), classes))


def test_every_family_is_tested_or_known_to_be_left():
    tested = set().union(*(classes for _, _, classes in MODELS.values()))
    elsewhere = ("transformers.", "monai.")
    here = [f for f in FAMILIES if f.replacement and not f.by_structure and not f.source.startswith(elsewhere)]
    assert {family.replacement_name for family in here} <= tested
    assert families_table().count("\n") == len(FAMILIES) + 1


def test_embedding_without_norm_is_skipped_for_lack_of_gain():
    report = af.accelerate(PatchEmbed(32, 4, 3, 8), strict=True)
    assert report.swapped == report.left == [] and "nothing to fuse" in report.nothing_to_gain[0].reason


def test_patches_of_other_sizes_are_refused_as_before():
    model = swin(56)
    af.accelerate(model)
    with pytest.raises(AssertionError, match="doesn't match"):
        model(image(60))
    model = maxvit(64)
    af.accelerate(model)
    with pytest.raises(AssertionError, match="divisible"):
        model(image(72))


# --------------------------------------------------------------------------- inference in parts


@pytest.mark.parametrize("name", ["swin", "tiny_vit", "torchvision"])
def test_mlp_in_parts(name, monkeypatch):
    mlp = importlib.import_module("asvit_fast.acceleration.chunked_mlp")
    monkeypatch.setattr(mlp, "LARGE", 0)
    monkeypatch.setattr(mlp, "LARGE_OF_OURS", 0)
    monkeypatch.setattr(mlp, "PART", 5000)
    make, size, _ = MODELS[name]
    model = prepared(make).eval()
    x = image(size)
    with torch.no_grad():
        expected = model(x)
        af.accelerate(model)
        calls = []
        source = mlp.tokens_at_a_time
        monkeypatch.setattr(mlp, "tokens_at_a_time", lambda m, x: calls.append(source(m, x)) or calls[-1])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls and all(tokens is not None for tokens in calls)


@pytest.mark.parametrize("name", ["swin", "tiny_vit", "torchvision"])
@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch's compiler takes no layers as arguments")
def test_compiled_mlp_for_inference(name, products_of_any_size, of):
    """GELU is in the product, which has more of it to gain than the compiler; not where a gradient is recorded."""
    make, size, _ = MODELS[name]
    model, x = prepared(make).eval(), image(size)
    with torch.no_grad():
        expected = model(x)
    af.accelerate(model)
    names = []

    def graph(module, inputs):
        names.extend(str(getattr(node.target, "__name__", node.target)) for node in module.graph.nodes)
        return module

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graph)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    apart = names.count("gelu")  # of convolutions
    names.clear()
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert names.count("gelu") > apart


def test_mlp_stays_whole_where_parts_would_change_or_cost_something(monkeypatch):
    mlp = importlib.import_module("asvit_fast.acceleration.chunked_mlp")
    monkeypatch.setattr(mlp, "LARGE", 0)
    monkeypatch.setattr(mlp, "LARGE_OF_OURS", 0)
    module = timm.layers.Mlp(8, 16, drop=0.5)
    layers = list(module.children())
    x = torch.randn(3, 5, 8)
    assert mlp.tokens_at_a_time(layers, x) is None  # gradients are wanted
    with torch.no_grad():
        assert mlp.tokens_at_a_time(layers, x) is None  # dropout draws in the order of calls
        module.eval()
        assert mlp.tokens_at_a_time(layers, x) is not None
        monkeypatch.setattr(mlp, "LARGE", 1 << 30)
        monkeypatch.setattr(mlp, "LARGE_OF_OURS", 1 << 30)
        assert mlp.tokens_at_a_time(layers, x) is None


# --------------------------------------------------------------------------- the authors' code


def authors_model() -> nn.Module:
    checkout = os.environ.get("ASVIT_FAST_ASVIT")
    if not checkout:
        pytest.skip("set ASVIT_FAST_ASVIT to a checkout of the authors' code")
    library = str(Path(checkout) / "lib")
    if library not in sys.path:
        sys.path.insert(0, library)
    transformer = importlib.import_module("models.cell_infers.transformer")
    return transformer.Transformer(
        img_size=64,
        patch_sizes=[8, 2, 3, 3],
        stride=4,
        num_classes=3,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_sizes=[2, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_authors_code(dtype):
    model = prepared(authors_model).to(dtype)
    af.accelerate(model, strict=True)
    authors = {family.replacement_name for family in FAMILIES if "Authors" in family.replacement_name}
    assert fast_classes(model) - {"FastLinear"} == {"FastMicrosoftMlp", *authors} and len(authors) == 3
    result = af.verify(model, image(64, dtype), rows=0)
    assert result.ok, result.table()


def test_authors_code_is_copied_pickled_and_restored():
    """Its replacements are classes made at run time."""
    model = prepared(authors_model).eval()
    before, expected = [type(module) for module in model.modules()], model(image(64))
    af.accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(image(64)), model(image(64)))
    af.restore(twin)
    assert [type(module) for module in twin.modules()] == before
    assert torch.equal(twin(image(64)), expected)
