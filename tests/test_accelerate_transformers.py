"""Families of Hugging Face's transformers against their sources on the same weights.

Needs ``pip install -e .[integrations]``; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from family_checks import Model, check_float64, check_swapped, prepared, sample
from test_accelerate_versions import check_declared_attributes, check_renamed_attributes, files_of
from tiny_swin import needs_kernels
from torch import nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration import FAMILIES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytestmark = needs_kernels
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 3}
FOUR = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2] * 4,
}


def part_of(path: str) -> Any:
    """The class at a path inside ``transformers.models``; skips where this version has none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def swin(size: int, **kwargs: Any) -> nn.Module:
    return transformers.SwinForImageClassification(transformers.SwinConfig(image_size=size, **SWIN, **kwargs))


def swin_v2(size: int) -> nn.Module:
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(image_size=size, **SWIN))


def donut() -> nn.Module:
    return transformers.DonutSwinModel(transformers.DonutSwinConfig(image_size=44, **SWIN))


def maskformer_swin() -> nn.Module:
    model = part_of("maskformer.modeling_maskformer_swin.MaskFormerSwinModel")
    return model(part_of("maskformer.configuration_maskformer_swin.MaskFormerSwinConfig")(image_size=44, **SWIN))


def clap() -> nn.Module:
    config = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=16, depths=[2, 2], num_attention_heads=[2, 4], window_size=4, spec_size=64,
        num_mel_bins=16, hidden_size=32, projection_dim=8, enable_fusion=False,
    )  # fmt: skip
    return transformers.ClapAudioModel(config)


def swin2sr() -> nn.Module:
    config = transformers.Swin2SRConfig(
        image_size=16, patch_size=1, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.Swin2SRModel(config)


def hiera() -> nn.Module:
    config = transformers.HieraConfig(image_size=[64, 64], embed_dim=16, depths=[2, 2, 2, 1], num_heads=[1, 2, 2, 2])
    return transformers.HieraModel(config)


def sam2() -> nn.Module:
    config = part_of("sam2.configuration_sam2.Sam2HieraDetConfig")(
        hidden_size=16, image_size=[64, 64], blocks_per_stage=[2, 2, 2, 1],
        embed_dim_per_stage=[16, 32, 48, 64], num_attention_heads_per_stage=[1, 2, 2, 2],
        window_size_per_stage=[4, 4, 3, 3], num_query_pool_stages=2, global_attention_blocks=[6],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    return part_of("sam2.modeling_sam2.Sam2HieraDetModel")(config)


def vitdet(**kwargs: Any) -> nn.Module:
    config = transformers.VitDetConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=64, pretrain_image_size=64, patch_size=4,
        window_block_indices=[0, 2], residual_block_indices=[2], window_size=5, **kwargs,
    )  # fmt: skip
    return transformers.VitDetModel(config)


def florence2() -> nn.Module:
    config = part_of("florence2.configuration_florence2.Florence2VisionConfig")(
        embed_dim=[8, 16, 16, 16], num_heads=[2] * 4, num_groups=[2] * 4, depths=[1] * 4,
        window_size=5,
    )  # fmt: skip
    return part_of("florence2.modeling_florence2.Florence2VisionBackbone")(config)


SWIN_CLASSES = {"FastSwinLayer", "FastSwinPatchMerging"}
DONUT_CLASSES = {"FastDonutSwinLayer", "FastDonutSwinPatchMerging"}
MASKFORMER_CLASSES = {"FastMaskFormerSwinLayer", "FastMaskFormerSwinPatchMerging"}
CLAP_CLASSES = {"FastClapAudioLayer", "FastClapAudioPatchMerging"}
FLORENCE2_CLASSES = {"FastFlorence2VisionWindowAttention", "FastFlorence2VisionMLP"}
# name: model, shape of its input, classes that have to be there afterwards
MODELS: dict[str, Model] = {
    "swin": (lambda: swin(32), (2, 3, 32, 32), SWIN_CLASSES),
    "swin padded": (lambda: swin(44), (2, 3, 44, 36), SWIN_CLASSES),
    "swin no bias": (lambda: swin(44, qkv_bias=False), (2, 3, 44, 44), SWIN_CLASSES),
    "swinv2": (lambda: swin_v2(32), (2, 3, 32, 32), {"FastSwinv2Layer"}),
    "swinv2 padded": (lambda: swin_v2(44), (2, 3, 44, 36), {"FastSwinv2Layer"}),
    "donut": (donut, (2, 3, 44, 44), DONUT_CLASSES),
    "maskformer": (maskformer_swin, (2, 3, 44, 52), MASKFORMER_CLASSES),
    "clap": (clap, (2, 1, 250, 16), CLAP_CLASSES),
    "swin2sr": (swin2sr, (1, 3, 20, 16), {"FastSwin2SRLayer"}),
    "hiera": (hiera, (1, 3, 64, 64), {"FastHieraMaskUnitAttention", "FastHieraMlp"}),
    "sam2": (sam2, (1, 3, 64, 64), {"FastSam2MultiScaleBlock"}),
    "vitdet": (vitdet, (1, 3, 64, 64), {"FastVitDetLayer"}),
    "florence2": (florence2, (1, 3, 64, 64), FLORENCE2_CLASSES),
    "segformer": (
        lambda: transformers.SegformerModel(transformers.SegformerConfig(**FOUR)),
        (1, 3, 66, 70),
        {"FastSegformerOverlapPatchEmbeddings"},
    ),
    "pvt_v2": (
        lambda: transformers.PvtV2Model(transformers.PvtV2Config(**FOUR)),
        (1, 3, 66, 70),
        {"FastPvtV2OverlapPatchEmbeddings"},
    ),
    "glpn": (
        lambda: transformers.GLPNModel(transformers.GLPNConfig(**FOUR)),
        (1, 3, 66, 70),
        {"FastGLPNOverlapPatchEmbeddings"},
    ),
}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_notified", set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    check_swapped(MODELS[name], dtype)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_rounding_in_float64(name: str) -> None:
    check_float64(MODELS[name])


@pytest.mark.parametrize("name", ["swinv2", "swinv2 padded"])
def test_mask_that_is_added_twice(name: str) -> None:
    """With cosines times 100 a key that is masked by -100 can outweigh all others; the source masks by -200."""
    make, shape, _ = MODELS[name]
    model = prepared(make).double().eval()
    x = sample(shape, torch.float64)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "logit_scale" in parameter_name:
                parameter.fill_(5.0)
        expected = model(x).logits
        af.accelerate(model)
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["swin padded", "swinv2 padded", "donut", "sam2"])
def test_autocast(name: str) -> None:
    make, shape, _ = MODELS[name]
    model = prepared(make)
    af.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = af.verify(model, sample(shape), rows=0)
    assert result.ok, result.table()


def test_every_family_is_tested() -> None:
    tested = set().union(*(classes for _, _, classes in MODELS.values())) | {"FastSwinMLP"}
    families = [family for family in FAMILIES if family.source.startswith("transformers.") and family.replacement]
    assert {str(family.replacement).rpartition(".")[2] for family in families} <= tested


@pytest.mark.parametrize("name", [name for name in MODELS if " " not in name])
def test_a_renamed_attribute_is_a_version_that_is_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_renamed_attributes(MODELS[name][0], monkeypatch)


@pytest.mark.parametrize("file", files_of("transformers"))
def test_attributes_that_are_read_are_declared(file: str) -> None:
    try:
        check_declared_attributes(file)
    except ImportError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


def test_a_missing_class_is_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = donut()
    monkeypatch.delitem(__import__("sys").modules, "asvit_fast.acceleration.transformers_donut", raising=False)
    monkeypatch.delattr("transformers.models.donut.modeling_donut_swin.DonutSwinSelfOutput")
    reasons = {decision.reason for decision in af.accelerate(model).left}
    assert len(reasons) == 1 and "this version of its package is not known" in str(reasons)
