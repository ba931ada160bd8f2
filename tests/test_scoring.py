"""Curve measures and score statistics: the authors' numbers, exact cases, non-finite networks."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest
import timm
import torch
from golden import CASES, golden
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.scoring import Curve, ScoreSettings, circle, score_repeat, theta_grid
from asvit_fast.scoring.draws import CIRCLE, WEIGHTS, draw, stream
from asvit_fast.scoring.ntk import score_features
from asvit_fast.scoring.score import NORMS, without_norms

SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
FAST = {"img_size": 32, "thetas": 4, "repeats": 2, "batch": 4}


@pytest.mark.parametrize("radius", ["r1", "rN"])
@pytest.mark.parametrize("norm", ["ln", "id"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_measures_equal_the_authors(case: str, norm: str, radius: str, dtype: torch.dtype) -> None:
    data = golden(case)
    loose = 2e-3 if (norm, radius) == ("id", "rN") else 1e-5
    tolerance = {"rel": 1e-9 if dtype == torch.float64 else loose, "abs": 0.0}
    with torch.no_grad():
        c = af.curve(
            data.model(norm, dtype).score_features, data["theta"], *data.circle(dtype), scale=data.scale(radius)
        )
    name = f"{norm}.{radius}"
    assert c.output.shape == c.velocity.shape == c.acceleration.shape == (10, 8 * data.meta["hidden"])
    assert af.length_distortion(c, "reference") == pytest.approx(float(data[f"{name}.LE"]), **tolerance)
    assert af.curvature(c, "reference") == pytest.approx(float(data[f"{name}.kappa"]), **tolerance)
    assert af.gauss_length(c, "reference") == pytest.approx(float(data[f"{name}.LkE_refcode"]), **tolerance)
    mean_to_integral = 2 * math.pi / 10
    assert af.gauss_length(c) == pytest.approx(mean_to_integral * float(data[f"{name}.LkE_true"]), **tolerance)
    assert c.velocity.norm(dim=1).tolist() == pytest.approx(data[f"{name}.speed"].tolist(), **tolerance)
    assert c.acceleration.norm(dim=1).tolist() == pytest.approx(data[f"{name}.accel"].tolist(), **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_paper_convention(case: str) -> None:
    """On the paper's open grid: 2 pi times the mean speed."""
    data = golden(case)
    with torch.no_grad():
        c = af.curve(data.model("id").score_features, theta_grid(10), *data.circle(), scale=data.scale("rN"), order=1)
    assert c.acceleration is None
    expected = 2 * math.pi * float(data["id.rN.speed_open"].mean())
    assert af.length_distortion(c) == pytest.approx(expected, rel=1e-9, abs=0.0)
    with pytest.raises(af.InputError, match="order=2"):
        af.curvature(c)


@pytest.mark.parametrize("radius", [0.5, 3.0])
def test_a_circle_has_the_measures_of_a_circle(radius: float) -> None:
    """Identity: length 2 pi r; its total curvature in the paper's sense 2 pi / r; its unit velocity turns once."""
    u0, u1 = circle((3, 4, 4), torch.Generator().manual_seed(0))
    assert float((u0 * u1).sum()) == pytest.approx(0, abs=1e-14)
    assert float(u0.norm()) == pytest.approx(1) and float(u1.norm()) == pytest.approx(1)
    c = af.curve(nn.Flatten(), theta_grid(7), u0, u1, scale=radius)
    assert af.length_distortion(c) == pytest.approx(2 * math.pi * radius, rel=1e-12)
    assert af.curvature(c) == pytest.approx(2 * math.pi / radius, rel=1e-12)
    assert af.gauss_length(c) == pytest.approx(2 * math.pi, rel=1e-12)
    assert af.length_distortion(c, "reference") == pytest.approx(7 * radius, rel=1e-12)


class Written(nn.Module):
    """Asks for the values and writes to the input before its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x[:, :, :5] = 2 * x[:, :, :5]
        x[:, :, 7] = 1.0
        return torch.tanh(self.conv(x).where(x[:, :1, 1::2, 1::2][..., :15, :15] > 0, 0.5))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("network", ["norms", "no norms", "convolution", "written"])
def test_a_circle_is_a_combination_of_two_inputs(network: str, dtype: torch.dtype, order: int) -> None:
    """The first projection of the two inputs alone, against all points pushed through."""
    torch.manual_seed(0)
    model = {
        "norms": lambda: af.create_model(SEED, img_size=32, num_classes=0),
        "no norms": lambda: af.create_model(SEED, img_size=32, num_classes=0, norm="identity"),
        "convolution": lambda: nn.Sequential(nn.Conv2d(3, 5, 4, padding=1), nn.GELU(), nn.Flatten()),
        "written": Written,
    }[network]().to(dtype)
    if hasattr(model, "patch_embed"):
        nn.init.normal_(model.patch_embed.proj.bias)
    fn = getattr(model, "score_features", model)
    theta, scale = theta_grid(5), 3.0
    u0, u1 = (u.to(dtype) for u in circle((3, 32, 32), torch.Generator().manual_seed(0)))
    cos, sin = ((scale * f(theta).to(dtype)).reshape(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
    x, dx = cos * u0 + sin * u1, cos * u1 - sin * u0  # [5, 3, 32, 32]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            c = af.curve(fn, theta, u0, u1, scale, order)
            expected = af.jvp(fn, x, dx) if order == 1 else af.jet(fn, x, dx, -x)
        got = [c.output, c.velocity] + ([] if c.acceleration is None else [c.acceleration])
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-5}
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs.flatten(1), **tolerance)


def test_theta_grids() -> None:
    assert theta_grid(4).tolist() == pytest.approx([0, math.pi / 2, math.pi, 3 * math.pi / 2])
    assert theta_grid(3, "reference").tolist() == pytest.approx([0, math.pi, 2 * math.pi])
    with pytest.raises(af.InputError, match="convention must be"):
        theta_grid(3, "mine")
    with pytest.raises(af.InputError, match="thetas must be 1 or more"):
        theta_grid(0)


def test_curvature_does_not_cancel() -> None:
    """An acceleration almost along the velocity: the formula's difference of products would be noise."""
    v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    a = torch.tensor([[1e6, 1e-6]], dtype=torch.float64)
    c = Curve(torch.zeros(1), v, v, a)
    assert af.curvature(c, "reference") == pytest.approx(1e-6, rel=1e-9)


def test_score_statistics_and_determinism() -> None:
    first = af.score(SEED, **FAST)
    assert list(first) == ["length_distortion", "curvature", "ntk_condition"]
    measure = first["length_distortion"]
    assert len(measure.values) == 2 and measure.seconds > 0
    assert measure.mean == pytest.approx(sum(measure.values) / 2)
    assert measure.std == pytest.approx(abs(measure.values[0] - measure.values[1]) / math.sqrt(2))
    assert af.score(af.Topology.parse(SEED), **FAST)["curvature"].values == first["curvature"].values
    assert af.score(SEED, **FAST, seed=1)["curvature"].values != first["curvature"].values
    again = json.loads(json.dumps(first.to_dict()))
    assert again["metrics"]["length_distortion"]["mean"] == measure.mean
    assert again["settings"]["img_size"] == 32 and again["target"].startswith("8,2,3,1|")


def test_a_score_says_what_it_is() -> None:
    images = torch.randn(4, 3, 32, 32)
    scored = af.score(SEED, **FAST, seed=7, images=images)
    lines = repr(scored).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) < 100 and "seed=7" in lines[0]
    assert f"{scored['curvature'].mean:.5g}" in repr(scored) and str(scored) == repr(scored)
    page = scored._repr_html_()
    assert page.count("<tr>") == 4 and f"{scored['ntk_condition'].mean:.5g}" in page and "seed 7" in page
    assert "<b>" not in dataclasses.replace(scored, target="<b>")._repr_html_()
    settings = scored.to_dict()["settings"]
    assert settings["seed"] == 7 and settings["device"] == "cpu" and settings["images"].startswith("4x3x32x32 ")
    assert settings["images"] != af.score(SEED, **FAST, images=images + 1).to_dict()["settings"]["images"]
    named = {field.name for field in dataclasses.fields(ScoreSettings)}
    assert set(settings) == named | {"seed", "images"}
    assert af.score(SEED, **FAST).to_dict()["settings"]["images"] is None
    assert len(repr(af.score(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), **FAST))) < 250


def test_a_score_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = types.SimpleNamespace(
        DataFrame=lambda rows, columns: [dict(zip(columns, row, strict=True)) for row in rows]
    )
    scored = af.score(SEED, ("length_distortion", "ntk_condition"), **FAST)
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    table = scored.to_dataframe()
    assert [row["repeat"] for row in table] == [0, 1, 0, 1] and table[3]["metric"] == "ntk_condition"
    assert table[1]["value"] == scored["length_distortion"].values[1]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(af.InputError, match="pip install pandas"):
        scored.to_dataframe()


def test_score_is_made_of_independent_repeats(two_threads: None) -> None:
    """The threads of `score` compute with one thread each: so are the repeats here, in any order."""
    settings = ScoreSettings(**FAST)
    whole = af.score(SEED, **FAST, seed=3)
    torch.set_num_threads(1)
    for repeat in (1, 0):
        results = score_repeat(SEED, repeat, settings, seed=3)
        for name, result in results.items():
            assert result["value"] == whole[name].values[repeat]


def test_streams() -> None:
    """Circles and images follow the first seed alone, weights the whole tuple."""
    assert stream(1, 2).initial_seed() != stream(2, 1).initial_seed()
    settings = ScoreSettings(metrics=("length_distortion",), **FAST)
    a = score_repeat(SEED, 0, settings, seed=(3, 0))["length_distortion"]["value"]
    b = score_repeat(SEED, 0, settings, seed=(3, 1))["length_distortion"]["value"]
    assert a != b and a == pytest.approx(b, rel=0.3)


def test_reference_convention_shares_the_convolution() -> None:
    topology = af.Topology.parse(SEED)
    for convention, shared in (("reference", True), ("paper", False)):
        settings = ScoreSettings(**FAST, convention=convention)
        one, two = (draw(topology, repeat, settings, 0) for repeat in (0, 1))
        assert torch.equal(one.patch_embed.proj.weight, two.patch_embed.proj.weight) is shared
        assert not torch.equal(one.stages[0].blocks[0].mlp.fc1.weight, two.stages[0].blocks[0].mlp.fc1.weight)


def test_reference_convention_by_hand() -> None:
    """score(convention="reference") is the sum over the closed grid on the unit circle, without norms, of the drawn
    network."""
    settings = ScoreSettings(**FAST, convention="reference")
    model = draw(af.Topology.parse(SEED), 0, settings, 5)
    u0, u1 = (u.float() for u in circle((3, 32, 32), stream(5, CIRCLE, 0)))
    with torch.no_grad():
        c = af.curve(without_norms(model).score_features, theta_grid(4, "reference"), u0, u1)
    got = score_repeat(SEED, 0, settings, seed=5)
    assert got["length_distortion"]["value"] == pytest.approx(af.length_distortion(c, "reference"), rel=1e-6)
    assert got["curvature"]["value"] == pytest.approx(af.curvature(c, "reference"), rel=1e-6)


def test_without_norms_shares_weights() -> None:
    model = af.create_model(SEED, img_size=32, num_classes=0).eval()
    bare = without_norms(model)
    same = af.create_model(SEED, img_size=32, num_classes=0, norm="identity").eval()
    same.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(bare.score_features(x), same.score_features(x))
    assert bare.stages[0].blocks[0].mlp.fc1.weight is model.stages[0].blocks[0].mlp.fc1.weight
    assert isinstance(model.norm, nn.LayerNorm) and not any(isinstance(m, nn.LayerNorm) for m in bare.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "resnetv2_50"])
def test_without_norms_keeps_activations(name: str) -> None:
    model = timm.create_model(name).eval()
    kinds = {type(m): type(m.act) for m in model.modules() if isinstance(m, NORMS) and hasattr(m, "act")}
    assert kinds
    bare = without_norms(model)
    assert not any(isinstance(m, NORMS) for m in bare.modules())
    for kind in set(kinds.values()) - {nn.Identity}:
        assert sum(type(m) is kind for m in bare.modules()) == sum(type(m) is kind for m in model.modules())


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.LayerNorm(8)


def test_without_a_norm_of_two_names() -> None:
    assert not any(isinstance(m, nn.LayerNorm) for m in without_norms(TwoNames()).modules())


def length_by_differences(model: nn.Module, size: int, thetas: int, repeat: int) -> float:
    """Length distortion of the paper: central differences along the circle, in float64."""
    features, step = score_features(model.double().eval()), 1e-5
    u0, u1 = circle((3, size, size), stream(0, CIRCLE, repeat))  # [3, H, W]

    def at(theta: Tensor) -> Tensor:
        cosine, sine = (function(theta)[:, None, None, None] for function in (torch.cos, torch.sin))
        return features(math.sqrt(u0.numel()) * (cosine * u0 + sine * u1)).flatten(1)  # [n, F]

    theta = theta_grid(thetas)
    with torch.no_grad():
        velocity = (at(theta + step) - at(theta - step)) / (2 * step)
    return float(2 * math.pi * velocity.norm(dim=1).mean())


def test_score_of_a_timm_name_is_that_of_freshly_drawn_networks() -> None:
    name, size = "vit_tiny_patch16_224", 64
    scored = af.score(name, metrics=("length_distortion",), img_size=size, thetas=2, repeats=2)
    for repeat, value in enumerate(scored["length_distortion"].values):
        with torch.random.fork_rng():
            torch.manual_seed(stream(0, WEIGHTS, repeat).initial_seed())
            model = timm.create_model(name, img_size=size)
        assert value == pytest.approx(length_by_differences(model, size, 2, repeat), rel=1e-4)


@pytest.mark.parametrize(("norms", "norm"), [("auto", "identity"), ("identity", "identity"), ("keep", "layer")])
def test_norms_are_left_out_or_kept(norms: str, norm: str) -> None:
    scored = af.score(SEED, metrics=("length_distortion",), norms=norms, **FAST)
    for repeat, value in enumerate(scored["length_distortion"].values):
        model = af.create_model(SEED, img_size=FAST["img_size"], num_classes=0, norm=norm)
        model.init_weights(generator=stream(0, WEIGHTS, repeat))
        by_differences = length_by_differences(model, FAST["img_size"], FAST["thetas"], repeat)
        assert value == pytest.approx(by_differences, rel=1e-4)


def test_score_of_a_module_leaves_it_as_it_was() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of_module = af.score(model, img_size=32, thetas=2, repeats=2, batch=3)
    assert len(of_module["ntk_condition"].values) == 1 and len(of_module["curvature"].values) == 2
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_module_keeps_its_dtype_and_image_size() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0).double()
    result = af.score(model, img_size=48, thetas=2, repeats=1, batch=2)
    assert math.isfinite(result["curvature"].mean)
    assert next(model.parameters()).dtype == torch.float64
    with pytest.raises(af.InputError, match="VisionTransformer does not take 2 images of 3 x 64 x 64: Input height"):
        af.score(model, img_size=64, thetas=2, repeats=1, batch=2)


def test_images_decide_the_ntk() -> None:
    images = torch.randn(6, 3, 32, 32)
    one = af.score(SEED, metrics=("ntk_condition",), images=images, **FAST)
    assert (
        one["ntk_condition"].values
        == af.score(SEED, metrics=("ntk_condition",), images=images[:4], **FAST)["ntk_condition"].values
    )
    assert one["ntk_condition"].values != af.score(SEED, metrics=("ntk_condition",), **FAST)["ntk_condition"].values


class Broken(nn.Module):
    """A network whose features overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(1e3 * self.linear(x.flatten(1)).abs() + 1e3)


def test_non_finite_results_are_reported() -> None:
    result = af.score(Broken(), **FAST)
    assert not math.isfinite(result["length_distortion"].mean)
    assert result["ntk_condition"].mean == math.inf
    assert math.isnan(result["length_distortion"].std)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"target": "8,2,3|4,1"}, "2 instead of 5 groups"),
        ({"target": "vit_tinny"}, "neither a topology nor a model of timm or torchvision"),
        ({"target": 3}, "got int"),
        ({"metrics": ("speed",)}, "metrics must be some of"),
        ({"repeats": 0}, "repeats must be an integer of 1 or more, got 0"),
        ({"batch": 2.5}, "batch must be an integer"),
        ({"convention": "both"}, "convention must be"),
        ({"norms": "drop"}, "norms must be"),
        ({"img_size": "big"}, "img_size must be"),
        ({"img_size": 16}, "32 pixels or more"),
        ({"images": torch.zeros(2, 3, 32, 32)}, "images must be"),
        ({"images": 3}, "images must be a tensor, a folder or None, got int"),
        ({"images": torch.full((4, 3, 32, 32), torch.nan)}, "images must be finite, number 0 of 4 is not"),
        ({"device": "cuda:99"}, "does not exist"),
        ({"device": "warp"}, "not known"),
        ({"seed": -1}, "seed must be an integer of 0 or more, got -1"),
        ({"seed": 0.5}, "seed must be an integer"),
    ],
)
def test_bad_arguments(arguments: dict, says: str) -> None:
    with pytest.raises(af.InputError, match=says) as error:
        af.score(**{"target": SEED, **FAST, **arguments})
    assert "\n" not in str(error.value)
