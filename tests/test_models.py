"""The network: the authors' numbers, timm's contract, any image size."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import timm.optim
import torch
from golden import CASES, golden, relative_error

import asvit_fast as af
from asvit_fast.nn import FeatScale

SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
TINY = "5,8,2,1|2,4,3,2|3,2,2,1|2,1,2,2|16,9"  # head_dim floored, uneven splits, several kernels
WITHOUT_EMBEDDING = {"seed": 2_319_624, "small": 28_775_328, "base": 52_258_652, "large": 87_580_820}
WITH_EMBEDDING = {"seed": 2_419_976, "small": 29_051_296, "base": 52_622_428, "large": 88_145_300}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", WITH_EMBEDDING)
def test_parameter_counts(size: str) -> None:
    with torch.device("meta"):
        assert count(timm.create_model(f"asvit_{size}", weight_init="skip")) == WITH_EMBEDDING[size]
        assert (
            count(timm.create_model(f"asvit_{size}", pos_embed="none", weight_init="skip")) == WITHOUT_EMBEDDING[size]
        )


@pytest.mark.parametrize("norm", ["ln", "id"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_authors(case: str, norm: str) -> None:
    data = golden(case)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5 if norm == "ln" else 1e-4)):
        model, images = data.model(norm, dtype), data.images(dtype)
        with torch.no_grad():
            features = model.forward_features(images)  # [8, h, w, F]
            assert relative_error(features.mean(dim=(1, 2)), data[f"{norm}.feat_normed"]) < tolerance
            assert relative_error(model.score_features(images), data[f"{norm}.feat"]) < tolerance
            assert relative_error(model(images), data[f"{norm}.logits"]) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_stages_equal_the_authors(case: str) -> None:
    data = golden(case)
    model, image = data.model("ln"), data.images()[:1]
    with torch.no_grad():
        tokens = model.patch_embed(image)  # [1, h, w, C]
        assert relative_error(tokens.mean(dim=(1, 2))[0], data["ln.stage0_mean"]) < 1e-12
        x = model.embed(image)
        for i, stage in enumerate(model.stages):
            x = stage(x)
            after = model.stages[i + 1].downsample(x) if i < 3 else x  # the authors merge at the end of a stage
            assert relative_error(after.mean(dim=(1, 2))[0], data[f"ln.stage{i + 1}_mean"]) < 1e-12
            mean_square, tokens_after = data[f"ln.stage{i + 1}_sq"].tolist()
            assert after.shape[1] * after.shape[2] == tokens_after
            assert float(after.square().mean()) == pytest.approx(mean_square, rel=1e-12)


def test_convert_is_idempotent_and_drops_norms() -> None:
    data = golden("s3")
    converted = af.convert_asvit_state_dict(data.state_dict)
    again = af.convert_asvit_state_dict(converted)
    assert converted.keys() == again.keys()
    assert converted["pos_embed"].shape == (1, 16, 16, 9)
    bare = data.model("id").state_dict()  # loaded from the weights with norms
    assert set(bare) == {name for name in converted if ".norm" not in name and not name.startswith("norm.")}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        data.model("id").load_state_dict({**bare, "surprise": torch.zeros(1)})
    bad = {"absolute_pos_embed": torch.zeros(1, 15, 9)}
    with pytest.raises(af.InputError, match="15 tokens"):
        af.convert_asvit_state_dict(bad)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (60, 36), (100, 52), (112, 224)])
@pytest.mark.parametrize("pos_embed", ["absolute", "none"])
def test_any_image_size(size: tuple[int, int], pos_embed: str) -> None:
    model = af.create_model(TINY, img_size=64, num_classes=3, pos_embed=pos_embed).eval()
    x = torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    for i, feature in enumerate(features):
        side = [math.ceil(s / 4) for s in size]
        for _ in range(i):
            side = [math.ceil(s / 2) for s in side]
        assert list(feature.shape) == [2, model.topology.dims[i], *side]
    logits = model(x)
    assert logits.shape == (2, 3) and torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_is_masked() -> None:
    """Tokens outside the map change nothing: a window larger than the map is the map."""
    torch.manual_seed(0)
    exact = af.create_model("4,1,2|2,1,2|2,1,2|2,1,2|16", img_size=32, num_classes=0).eval().double()
    padded = copy.deepcopy(exact)
    padded.set_input_size(window_size=11)  # 8, 4, 2 and 1 tokens per side: every window is padded
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(padded(x), exact(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("kernel", [4, 5, 6, 7, 8])
def test_token_reduction(kernel: int, reduction: int) -> None:
    model = af.create_model(
        f"{kernel},2,2|3,1,2|2,1,2|4,1,2|16", img_size=64, num_classes=2, pos_embed="absolute"
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_token_reduction(reduction)
    span_pixels = {1: 1, 2: 2, 4: 4 if kernel in (8,) else 5}
    assert model.patch_embed.stride == 4 * reduction
    assert model.patch_embed.dilation == span_pixels[reduction]  # the paper's (16, 5), (8, 2), (4, 1) for kernel 4
    features = model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    assert [f.shape[-1] for f in features] == [math.ceil(16 / reduction / 2**i) for i in range(4)]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for wrong in (0, 3, 8, "2"):
        with pytest.raises(af.InputError, match="token reduction must be 1, 2 or 4"):
            model.set_token_reduction(wrong)


def test_timm_contract() -> None:
    model = timm.create_model(
        "asvit", topology=TINY, img_size=64, num_classes=5, drop_path_rate=0.2, proj_drop_rate=0.1
    )
    x = torch.randn(2, 3, 64, 64)
    assert model.num_features == model.head_hidden_size == 72 and model.output_fmt == "NHWC"
    assert model.no_weight_decay() == {"pos_embed"}
    assert model.get_classifier().out_features == 5
    model.eval()
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    pre_logits = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    with pytest.raises(af.InputError, match="needs num_classes=0"):
        model.reset_classifier(3, "")
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_features_only_is_nchw_at_strides_4_to_32() -> None:
    model = timm.create_model("asvit_seed", features_only=True, img_size=96).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [32, 64, 128, 256]
    features = model(torch.randn(1, 3, 96, 96))
    assert [tuple(f.shape) for f in features] == [(1, 32, 24, 24), (1, 64, 12, 12), (1, 128, 6, 6), (1, 256, 3, 3)]
    some = timm.create_model("asvit_seed", features_only=True, out_indices=(1, 2), img_size=96)
    assert [f.shape[1] for f in some(torch.randn(1, 3, 96, 96))] == [64, 128]


def test_forward_intermediates() -> None:
    """The two checks of timm's tests that its suite skips for models from other packages."""
    model = af.create_model(TINY, img_size=64, pos_embed="absolute").eval()
    x = torch.randn(1, 3, 64, 64)
    output, intermediates = model.forward_intermediates(x, output_fmt="NCHW")
    assert [f.shape[1] for f in intermediates] == [info["num_chs"] for info in model.feature_info]
    assert torch.allclose(output, model.forward_features(x))
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(x, output_fmt="NCHW")
    assert torch.allclose(output, again, rtol=1e-4, atol=1e-5)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close(last[0], output)
    assert model.prune_intermediate_layers([1]) == [1] and len(model.stages) == 2
    with pytest.raises(af.InputError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_grad_checkpointing_changes_nothing() -> None:
    model = af.create_model(TINY, img_size=64, num_classes=4).train()
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for p, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_set_input_size_resamples_the_embedding() -> None:
    model = timm.create_model("asvit", topology=TINY, img_size=64, num_classes=0)
    model.set_input_size(img_size=(96, 64), window_size=(8, 4, 4, (2, 3)))
    assert model.pos_embed.shape == (1, 24, 16, 9)
    assert model.stages[3].blocks[0].attn.window == (2, 3)
    assert torch.isfinite(model(torch.randn(1, 3, 96, 64))).all()
    with pytest.raises(af.InputError, match="one per stage"):
        model.set_input_size(window_size=(7, 7))
    rebuilt = timm.create_model("asvit", topology=TINY, img_size=64, num_classes=0)
    from asvit_fast.models.state_dict import fit_state_dict

    rebuilt.load_state_dict(fit_state_dict(model.state_dict(), rebuilt))
    assert rebuilt.pos_embed.shape == (1, 16, 16, 9)


def test_script_trace_compile_and_export_agree() -> None:
    model = af.create_model(TINY, img_size=64, num_classes=3, pos_embed="absolute").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_half_precision_and_autocast() -> None:
    model = af.create_model(TINY, img_size=64, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.02)


def test_meta_construction_and_initialisation() -> None:
    with torch.device("meta"):
        model = af.create_model(SEED, weight_init="skip")
    model = model.to_empty(device="cpu")
    model.init_weights(generator=torch.Generator().manual_seed(5))
    same = af.create_model(SEED)
    same.init_weights(generator=torch.Generator().manual_seed(5))
    for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert model.stages[0].blocks[0].attn.qkv.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    assert model.stages[0].blocks[0].attn.qkv.bias.abs().max() == 0
    bound = (3 * 8 * 8) ** -0.5
    assert 0.9 * bound < model.patch_embed.proj.weight.detach().abs().max() <= bound


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"img_size": 16}, "32 pixels or more"),
        ({"img_size": "224"}, "32 pixels or more"),
        ({"pos_embed": "rope"}, "pos_embed must be"),
        ({"norm": "batch"}, "norm must be"),
        ({"global_pool": "max"}, "global_pool must be"),
        ({"weight_init": "jax"}, "weight_init must be"),
    ],
)
def test_bad_arguments(arguments: dict, says: str) -> None:
    with pytest.raises(af.InputError, match=says):
        af.create_model(SEED, **arguments)


SCALED = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,4"


def test_scales_against_over_smoothing() -> None:
    """Both start as the identity, are trained, and survive scripting, scoring and the NTK."""
    torch.manual_seed(0)
    plain = af.create_model(SCALED, img_size=64, num_classes=5).eval()
    scaled = af.create_model(SCALED, img_size=64, num_classes=5, attn_scale=True, feat_scale=True).eval()
    missing = scaled.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith(("attn_scale", "feat_scale.low", "feat_scale.high")) for key in missing)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(scaled(image), plain(image))
    assert set(missing) <= scaled.no_weight_decay()
    gradients = torch.autograd.grad(scaled(image).square().sum(), list(scaled.parameters()), allow_unused=True)
    for (name, _), gradient in zip(scaled.named_parameters(), gradients, strict=True):
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, name
    torch.testing.assert_close(torch.jit.script(scaled)(image), plain(image))
    curve = af.score(scaled, metrics=("length_distortion", "ntk_condition"), img_size=64, repeats=1, thetas=3, batch=2)
    assert curve["length_distortion"].mean > 0 and curve["ntk_condition"].mean > 0


def test_feat_scale() -> None:
    module = FeatScale(3).double()
    torch.nn.init.normal_(module.low)
    torch.nn.init.normal_(module.high)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    mean = x.mean((1, 2), keepdim=True)
    torch.testing.assert_close(module(x), x + module.low * mean + module.high * (x - mean))
    flat = x.flatten(1, 2)
    torch.testing.assert_close(module(flat), module(x).flatten(1, 2))
