"""The NTK Gram against the authors' numbers and against one backward pass per sample."""

from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import CASES, golden, relative_error
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.nn import PatchMerging
from asvit_fast.scoring import contractions
from asvit_fast.scoring.ntk import score_features


def gram_one_by_one(model: nn.Module, images: Tensor, parameters: str = "weights") -> Tensor:
    chosen = [p for name, p in model.named_parameters() if parameters == "all" or "weight" in name]
    rows = []
    for sample in score_features(model)(images):
        gradients = torch.autograd.grad(
            sample.sum(), chosen, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows).double()
    return rows @ rows.T


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    backends._notified.clear()


@pytest.mark.parametrize("norm", ["ln", "id"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")  # every layer has a rule
def test_gram_equals_the_authors(case: str, norm: str) -> None:
    data = golden(case)
    condition = float(data[f"{norm}.ntk_cond"])
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        model, images = data.model(norm, dtype), data.images(dtype)
        gram = af.ntk_gram(model, images)
        assert gram.dtype == torch.float64
        assert relative_error(gram, data[f"{norm}.ntk_gram"]) < tolerance
        assert (
            relative_error(af.ntk_gram(model, images, parameters="all"), data[f"{norm}.ntk_gram_allparams"]) < tolerance
        )
        assert af.ntk_condition(gram) == pytest.approx(condition, rel=tolerance, abs=0.0)
        assert all(p.grad is None for p in model.parameters())


class Shared(nn.Module):
    """One Linear used at two resolutions, a position embedding, a layer scale, grouped convolution, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=1, groups=1)
        self.grouped_weight = nn.Parameter(torch.randn(8, 2, 3, 3) / 4)
        self.norm = nn.BatchNorm2d(8)
        self.position_weight = nn.Parameter(torch.randn(1, 64, 8))
        self.scale_weight = nn.Parameter(torch.randn(8))
        self.linear = nn.Linear(8, 8)
        self.unused_weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x)))
        x = F.conv2d(x, self.grouped_weight, None, padding=2, dilation=2, groups=4).flatten(2).transpose(1, 2)
        x = x + self.position_weight
        x = x + self.scale_weight * torch.tanh(self.linear(x))
        return torch.tanh(self.linear(x[:, ::4])).mean(1)


class Unknown(nn.Module):
    """Weights inside functions that have no rule; one of them also inside a function that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 5)
        self.linear = nn.Linear(12, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x.flatten(1)[:, :12]))
        x = F.linear(x, self.weight) + x @ torch.matrix_exp(0.1 * self.weight)
        return self.bilinear(x, x)


class SequenceFirst(nn.Module):
    """Tokens before samples: rows of a layer's input are not samples one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :48].unflatten(1, (8, 6)).transpose(0, 1)  # [8, B, 6]
        x = torch.tanh(self.linear(x))
        return self.attention(x, x, x, need_weights=False)[0].mean(0)


class Merging(nn.Module):
    """Patch merging of odd grids, one weight also in a Linear: its features are there in another order."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.merge, self.again = (PatchMerging(kernel, 3, 4), PatchMerging(kernel, 4, 3))
        self.shared = PatchMerging(kernel, 3, 5)
        self.classifier_weight = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.merge(x.permute(0, 2, 3, 1)[:, :13, :11]))))  # [B, 4, 3, 3]
        once_more = F.linear(x.flatten(1).tile(5)[:, : self.shared.reduction.in_features], self.shared.reduction.weight)
        x = torch.tanh(self.shared(x)).mean((1, 2)) + once_more
        return F.linear(x, self.classifier_weight)


@pytest.mark.parametrize("parameters", ["weights", "all"])
@pytest.mark.parametrize("network", [Shared, Unknown, SequenceFirst, Merging])
@pytest.mark.filterwarnings("ignore:asvit_fast. the NTK differentiates")
def test_gram_equals_one_backward_per_sample(network: type[nn.Module], parameters: str) -> None:
    torch.manual_seed(0)
    model = network().double().eval()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(
        af.ntk_gram(model, images, parameters), gram_one_by_one(model, images, parameters), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 7])
@pytest.mark.filterwarnings("ignore:asvit_fast. the NTK differentiates")
def test_every_kernel_of_merging(kernel: int) -> None:
    torch.manual_seed(0)
    model, images = Merging(kernel).double().eval(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(af.ntk_gram(model, images), gram_one_by_one(model, images), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [32, 44])  # few tokens: products of pairs of tokens; many: products of whole gradients
@pytest.mark.parametrize("piece", [1, 1000, contractions.PIECE])
def test_pieces(piece: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the parameters are cut; the condition number in float32 is that in float64."""
    monkeypatch.setattr(contractions, "PIECE", piece)
    monkeypatch.setattr(contractions, "SHORT", min(piece, contractions.SHORT))
    torch.manual_seed(0)
    model, images = (
        af.create_model("5,2,2|3,1,2|2,1,2|4,1,2|16,16", img_size=size).eval(),
        torch.randn(3, 3, size, size),
    )
    gram = af.ntk_gram(model, images)
    model, images = model.double(), images.double()
    expected = gram_one_by_one(model, images)
    assert relative_error(gram, expected) < 1e-6
    assert math.log(af.ntk_condition(gram)) == pytest.approx(math.log(af.ntk_condition(expected)), abs=1e-6)
    assert relative_error(af.ntk_gram(model, images), expected) < 1e-10


def test_almost_equal_images() -> None:
    """An ill-conditioned Gram matrix, which sums in float32 would get wrong by percents."""
    torch.manual_seed(0)
    model = af.create_model("5,2,2|3,1,2|2,1,2|4,1,2|16,16", img_size=64).eval()
    images = torch.randn(1, 3, 64, 64) + 3e-4 * torch.randn(8, 3, 64, 64)
    condition = af.ntk_condition(af.ntk_gram(model, images))
    expected = af.ntk_condition(gram_one_by_one(model.double(), images.double()))
    assert expected > 1e6
    assert math.log(condition) == pytest.approx(math.log(expected), abs=1e-3)


def test_slow_layers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with pytest.warns(backends.FallbackWarning, match=r"bilinear\.weight \(bilinear\)"):
        af.ntk_gram(Unknown().double(), images)
    with pytest.warns(backends.FallbackWarning, match=r"linear\.weight \(linear\)"):
        af.ntk_gram(SequenceFirst().double(), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        af.ntk_gram(Shared().double(), images)  # all known
    monkeypatch.setenv("ASVIT_FAST_STRICT", "1")
    with pytest.raises(backends.FallbackWarning):
        af.ntk_gram(Unknown().double(), images)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t", "convnext_atto"])
@pytest.mark.filterwarnings("ignore:asvit_fast. the NTK differentiates")
def test_timm_networks(name: str) -> None:
    torch.manual_seed(0)
    size = {"vit_tiny_patch16_224": 64, "swin_tiny_patch4_window7_224": 56}.get(name, 64)
    options: dict[str, int] = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    if name.startswith("swin"):
        options["embed_dim"] = 48  # its gradients of all images in float64 are large
    model = timm.create_model(name, num_classes=0, **options).double().eval()
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    for parameters in ("weights", "all"):
        expected = gram_one_by_one(model, images, parameters)
        assert relative_error(af.ntk_gram(model, images, parameters), expected) < 1e-10


def test_frozen_parameters_do_not_count() -> None:
    model = af.create_model("4,1,2|2,1,2|2,1,2|2,1,2|16,16", img_size=32, num_classes=0).eval()
    images = torch.randn(3, 3, 32, 32)
    full = af.ntk_gram(model, images)
    model.patch_embed.requires_grad_(False)
    assert not torch.allclose(af.ntk_gram(model, images), full)
    model.requires_grad_(False)
    with pytest.raises(af.InputError, match="require gradients"):
        af.ntk_gram(model, images)
    with pytest.raises(af.InputError, match="'weights' or 'all'"):
        af.ntk_gram(model, images, parameters="biases")


def test_condition() -> None:
    assert af.ntk_condition(torch.diag(torch.tensor([4.0, 2.0, 1.0]))) == pytest.approx(4.0)
    assert af.ntk_condition(torch.diag(torch.tensor([4.0, 0.0]))) == math.inf
    assert (
        af.ntk_condition(torch.diag(torch.tensor([4.0, -1e-9]))) == math.inf
    )  # the authors' code would call it excellent
    assert af.ntk_condition(torch.full((2, 2), math.nan)) == math.inf
    assert af.ntk_condition(torch.full((2, 2), math.inf)) == math.inf
    with pytest.raises(af.InputError, match="square"):
        af.ntk_condition(torch.zeros(2, 3))


def network_of(kind: str) -> tuple[nn.Module, int]:
    if kind == "asvit":
        return af.create_model("8,2,3|4,1,2|4,1,4|4,1,6|32", img_size=64, num_classes=0), 64
    return timm.create_model(kind, num_classes=0, **({"img_size": 64} if kind.startswith("vit") else {})), 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["asvit", "vit_tiny_patch16_224", "resnet10t"])
def test_singular_grams_are_infinite(kind: str, dtype: torch.dtype) -> None:
    """One image twice, images all black; near copies and different images are not singular."""
    torch.manual_seed(0)
    model, size = network_of(kind)
    model, images = model.to(dtype), torch.randn(8, 3, size, size, dtype=dtype)
    different = af.ntk_condition(af.ntk_gram(model, images))
    assert 1 < different < 1e9
    images[5] = images[2]
    assert af.ntk_condition(af.ntk_gram(model, images)) == math.inf
    images[5] += 1e-4 * torch.randn(3, size, size, dtype=dtype)
    near = af.ntk_condition(af.ntk_gram(model, images))
    assert different < near < 1e13
    assert af.ntk_condition(af.ntk_gram(model, torch.zeros(4, 3, size, size, dtype=dtype))) == math.inf


@pytest.mark.parametrize("size", [2, 16, 64])
def test_rounding_of_a_gram_is_zero(size: int) -> None:
    """Matrices of known eigenvalues, with a smallest one on either side of size * rounding unit * the largest."""
    rotation = torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    for scale in (1e-30, 1.0, 1e30):
        for smallest, singular in ((1e-11, False), (1e-20, True), (0.0, True), (-1e-16, True)):
            eigenvalues = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
            eigenvalues[0] = smallest
            condition = af.ntk_condition(scale * (rotation * eigenvalues) @ rotation.T)
            assert condition == math.inf if singular else condition == pytest.approx(2 / smallest, rel=1e-2)
    for positive, condition in ((1e-6, 1e6), (1e-8, math.inf)):  # float32 knows less
        diagonal = torch.diag(torch.tensor([1.0, positive]))
        assert af.ntk_condition(diagonal) == pytest.approx(condition, rel=1e-5)
        assert af.ntk_condition(diagonal.double()) == pytest.approx(1 / positive, rel=1e-5)
    assert af.ntk_condition(torch.zeros(3, 3)) == math.inf
