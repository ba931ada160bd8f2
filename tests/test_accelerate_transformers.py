"""Families of Hugging Face's transformers against their sources on the same weights, and the ways that people use them.

Needs ``pip install -e .[integrations]``; nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_accelerate_families import fast_classes, prepared
from test_accelerate_versions import check_declared_attributes, check_renamed_attributes, files_of
from tiny_swin import close, needs_kernels
from torch import Tensor, nn

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
Model = tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]
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


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def tensors(output: Any) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output.to_tuple()


def images(model: nn.Module, size: int = 44) -> Tensor:
    return sample((2, 3, size, size), next(model.parameters()).dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    make, shape, expected = MODELS[name]
    model = prepared(make).to(dtype)
    kinds, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    report = af.accelerate(model, strict=True)
    assert expected <= fast_classes(model)
    assert expected <= {decision.replacement for decision in report.swapped}
    result = af.verify(model, sample(shape, dtype), rows=0)
    assert result.ok, result.table()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [type(module) for module in af.restore(model).modules()] == kinds


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_rounding_in_float64(name: str) -> None:
    make, shape, _ = MODELS[name]
    model = prepared(make).double().eval()
    x = sample(shape, torch.float64)
    with torch.no_grad():
        expected = tensors(model(x))
        af.accelerate(model)
        for actual, wanted in zip(tensors(model(x)), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


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


def test_copied_and_pickled() -> None:
    model = prepared(lambda: swin(44)).eval()
    af.accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(images(twin)).logits, model(images(model)).logits)


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


# --------------------------------------------------------------------------- what the source runs


@pytest.mark.parametrize("make", [swin, swin_v2], ids=["swin", "swinv2"])
def test_attention_weights_are_those_of_the_source_and_said_once(make: Callable[[int], nn.Module]) -> None:
    model = prepared(lambda: make(44)).eval()
    if make is swin:
        model.set_attn_implementation("eager")
    x = images(model)
    with torch.no_grad():
        expected = model(x, output_attentions=True)
        af.accelerate(model)
        with pytest.warns(backends.FallbackWarning, match="output_attentions needs the attention weights") as warned:
            actual = model(x, output_attentions=True)
        assert sum("output_attentions" in str(w.message) for w in warned) == 1
    assert len(actual.attentions) == len(expected.attentions) > 0
    for fast, source in zip(actual.attentions, expected.attentions, strict=True):
        close(fast, source)


def test_attention_weights_that_hooks_collect() -> None:
    """The source's hooks stay on its attention; they are looked at only while they collect."""
    model = prepared(sam2).eval()
    model.set_attn_implementation("eager")
    x = sample(MODELS["sam2"][1])
    with torch.no_grad():
        expected = model(x, output_attentions=True).attentions
        af.accelerate(model)
        with pytest.warns(backends.FallbackWarning, match="its attn has a forward hook"):
            actual = model(x, output_attentions=True).attentions
        for fast, source in zip(actual, expected, strict=True):
            close(fast, source)
        backends._notified.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="asvit_fast runs Sam2")
            model(x, output_hidden_states=True)


def test_head_masks_run_the_source() -> None:
    layer_class = importlib.import_module("transformers.models.swin.modeling_swin").SwinLayer
    if "head_mask" not in inspect.signature(layer_class.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} has no head masks")
    layer = prepared(lambda: swin(44)).eval().swin.encoder.layers[0].blocks[0]
    tokens, mask = torch.randn(2, 121, 16), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    with torch.no_grad():
        expected = layer(tokens, (11, 11), mask)[0]
        af.accelerate(layer)
        with pytest.warns(backends.FallbackWarning, match="head_mask"):
            close(layer(tokens, (11, 11), mask)[0], expected)


def test_another_attention_implementation_runs_the_source() -> None:
    model = prepared(lambda: swin(44)).eval()
    if "FastSwinMLP" not in fast_classes(_accelerated(model)):
        pytest.skip("this version's Swin has one implementation")
    af.restore(model)
    with torch.no_grad():
        expected = model(images(model)).logits
        calls: list[int] = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)

        transformers.AttentionInterface.register("counted", counted)
        model.config._attn_implementation = "counted"
        report = af.accelerate(model)
        assert "its attention is 'counted'" in {decision.reason for decision in report.left}
        close(model(images(model)).logits, expected)
        assert len(calls) == 4


def _accelerated(model: nn.Module) -> nn.Module:
    af.accelerate(model)
    return model


def test_relative_positions_that_depend_on_the_query_are_left() -> None:
    report = af.accelerate(vitdet(use_relative_position_embeddings=True), strict=True)
    reasons = {str(decision.reason) for decision in report.nothing_to_gain}
    assert any("depends on the query" in reason for reason in reasons)


def test_dropout_of_the_same_seed_is_the_same() -> None:
    model = prepared(lambda: swin(44, hidden_dropout_prob=0.5)).train()
    x = images(model)
    torch.manual_seed(3)
    expected = model(x).logits
    af.accelerate(model)
    torch.manual_seed(3)
    close(model(x).logits, expected)


def test_attention_dropout_runs_the_source() -> None:
    model = prepared(lambda: swin(44, attention_probs_dropout_prob=0.5)).train()
    af.accelerate(model)
    with pytest.warns(backends.FallbackWarning, match="dropout"):
        model(images(model))


def test_maps_smaller_than_a_window_are_as_before() -> None:
    """The source lowers the windows of its layers for good, and then lacks a bias for them."""
    model = prepared(lambda: swin(44)).eval()
    small = sample((1, 3, 12, 12))
    with pytest.raises(RuntimeError) as expected:
        copy.deepcopy(model)(small)
    af.accelerate(model)
    with pytest.warns(backends.FallbackWarning, match="its windows are"), pytest.raises(RuntimeError) as actual:
        model(small)
    assert str(actual.value) == str(expected.value)


# --------------------------------------------------------------------------- ways to use them


def test_hidden_states_and_the_hooks_that_collect_them() -> None:
    for make in (functools.partial(swin, 44), sam2):
        model = prepared(make).eval()
        x = images(model, 64)
        with torch.no_grad():
            expected = model(x, output_hidden_states=True)
            af.accelerate(model)
            actual = model(x, output_hidden_states=True)
            assert len(actual.hidden_states) == len(expected.hidden_states) > 0
            for fast, source in zip(actual.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(fast, source, rtol=1e-3, atol=1e-4)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = prepared(lambda: swin(44)).eval()
    expected = model(images(model)).logits
    af.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert fast_classes(loaded) == set()
    close(loaded(images(model)).logits, expected)
    af.accelerate(loaded)
    assert fast_classes(loaded) == fast_classes(model)
    close(loaded(images(model)).logits, expected)


def test_pipeline() -> None:
    model = prepared(lambda: swin(44)).eval()
    size = {"height": 44, "width": 44}
    picture = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    from PIL import Image

    processor = transformers.ViTImageProcessor(size=size)
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = classify(Image.fromarray(picture))
    af.accelerate(model)
    for fast, source in zip(classify(Image.fromarray(picture)), expected, strict=True):
        assert fast["label"] == source["label"] and fast["score"] == pytest.approx(source["score"], abs=1e-4)


def test_backbone() -> None:
    config = transformers.SwinConfig(image_size=44, **SWIN, out_features=["stage1", "stage2"])
    model = prepared(lambda: transformers.AutoBackbone.from_config(config)).eval()
    x = sample((1, 3, 44, 52))
    expected = model(x).feature_maps
    af.accelerate(model, strict=True)
    assert fast_classes(model) >= SWIN_CLASSES
    for fast, source in zip(model(x).feature_maps, expected, strict=True):
        close(fast, source)


def backbone_config(**kwargs: Any) -> Any:
    features = [f"stage{i}" for i in range(1, 5)]
    options = {**SWIN, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2], "out_features": features}
    return transformers.SwinConfig(image_size=64, **options, **kwargs)


def mask2former() -> nn.Module:
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 4, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}
    return transformers.Mask2FormerModel(
        transformers.Mask2FormerConfig(backbone_config=backbone_config(), **small, **layers)
    )


def maskformer() -> nn.Module:
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    decoder = transformers.DetrConfig(**small, **heads)
    config = transformers.MaskFormerConfig(
        backbone_config=backbone_config(), decoder_config=decoder, mask_feature_size=32, fpn_feature_size=32
    )
    return transformers.MaskFormerModel(config)


@pytest.mark.parametrize("make", [mask2former, maskformer])
def test_segmentation_with_a_swin_backbone(make: Callable[[], nn.Module]) -> None:
    model = prepared(make).eval()
    x = sample((1, 3, 72, 80))
    with torch.no_grad():
        expected = model(x).transformer_decoder_last_hidden_state
        report = af.accelerate(model, strict=True)
        assert any(str(decision.replacement).endswith("SwinLayer") for decision in report.swapped)
        actual = model(x, output_hidden_states=True).transformer_decoder_last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(images(model), labels=torch.tensor([0, 1])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing() -> None:
    model = prepared(lambda: swin(44)).train()
    af.accelerate(model)
    expected = gradients(model)
    calls = []
    model.swin.encoder.layers[0].blocks[1].layernorm_before.register_forward_hook(lambda *args: calls.append(1))
    gradients(model)
    once = len(calls)
    model.gradient_checkpointing_enable()
    actual = gradients(model)
    assert len(calls) > 2 * once  # run again in the backward pass
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_compiled() -> None:
    config = transformers.SwinConfig(image_size=44, **{**SWIN, "depths": [2], "num_heads": [2]})
    model = prepared(lambda: transformers.SwinModel(config)).eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x).last_hidden_state
        af.accelerate(model)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["swin", "donut", "swinv2"])
def test_feed_forward_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = importlib.import_module("asvit_fast.acceleration.chunked_mlp")
    monkeypatch.setattr(mlp, "LARGE", 0)
    monkeypatch.setattr(mlp, "PART", 5000)
    make, shape, _ = MODELS[name]
    model = prepared(make).eval()
    x = sample(shape)
    with torch.no_grad():
        expected = model(x)[0]
        af.accelerate(model)
        calls: list[int] = []
        activation = next(m for m in model.modules() if type(m).__module__ == "transformers.activations")
        source = activation.forward
        monkeypatch.setattr(type(activation), "forward", lambda self, x: calls.append(1) or source(x))
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
        assert len(calls) > 8
