"""Accelerated networks of Hugging Face's transformers: what runs the source, and the ways that people use them.

Needs ``pip install -e .[integrations]``; nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from family_checks import fast_classes, prepared
from test_accelerate_transformers import MODELS, SWIN, SWIN_CLASSES, sam2, sample, swin, swin_v2, vitdet
from tiny_swin import close, needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration.replacement import Replacement

transformers = pytest.importorskip("transformers")
pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_notified", set())


def images(model: nn.Module, size: int = 44) -> Tensor:
    return sample((2, 3, size, size), next(model.parameters()).dtype)


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
    pytest.importorskip("transformers.utils.output_capturing")
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


def test_restored_after_outputs_were_collected_by_patched_methods() -> None:
    """transformers 4 leaves a bound method on each module that it collected outputs of."""
    model = prepared(lambda: swin(44)).eval()
    expected = model(images(model)).logits
    af.accelerate(model)
    for module in model.modules():
        if isinstance(module, Replacement):
            module.forward = module.forward
    af.restore(model)
    assert torch.equal(model(images(model)).logits, expected)


def test_restored_from_a_class_that_was_derived_at_run_time() -> None:
    """As fully_shard derives one from that of a layer, whose forward transformers 5 wraps then."""
    model = prepared(lambda: swin(44)).eval()
    expected = model(images(model)).logits
    af.accelerate(model)
    fast = model(images(model)).logits
    for module in model.modules():
        if type(module).__name__ == "FastSwinLayer":
            module.__class__ = type("ShardedFastSwinLayer", (type("Sharded", (), {}), type(module)), {})
    assert torch.equal(model(images(model)).logits, fast)
    af.restore(model)
    assert "ShardedSwinLayer" in {type(module).__name__ for module in model.modules()}
    assert torch.equal(model(images(model)).logits, expected)


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


def test_copied_and_pickled() -> None:
    model = prepared(lambda: swin(44)).eval()
    af.accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(images(twin)).logits, model(images(model)).logits)


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
    monkeypatch.setattr(mlp, "LARGE_OF_OURS", 0)
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
        linear = mlp.linear  # whose products have the activation inside
        monkeypatch.setattr(mlp, "linear", lambda *arguments: calls.append(1) or linear(*arguments))
        torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)
        assert len(calls) > 8
