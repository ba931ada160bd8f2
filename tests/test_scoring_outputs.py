"""What networks return: tensors, logits, the only tensor of a tuple or dict; batches of one size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asvit_fast as af

METRICS = ("length_distortion", "ntk_condition")
SETTINGS: dict[str, Any] = {"img_size": 16, "repeats": 1, "batch": 6}


class Network(nn.Module):
    """[n, 3, 16, 16] -> what ``put`` makes of its outputs [n, F]."""

    def __init__(self, put: Any, outputs: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.put = nn.Conv2d(3, 8, 3), nn.Linear(8, outputs), put

    def forward(self, x: Tensor) -> Any:
        return self.put(self.head(self.conv(x).tanh().mean((2, 3))))


def values(network: nn.Module, **settings: Any) -> list[float]:
    score = af.score(network, METRICS, **{**SETTINGS, **settings})
    return [score[metric].mean for metric in METRICS]


@pytest.mark.parametrize(
    "put",
    [
        lambda y: (y, None),
        lambda y: [y],
        lambda y: {"features": y, "aux": None},
        lambda y: {"hidden": y * 2, "logits": y, "attention": y.softmax(-1)},
    ],
    ids=["tuple", "list", "dict", "logits"],
)
def test_a_tensor_inside(put: Any) -> None:
    assert values(Network(put)) == values(Network(lambda y: y))


def test_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).logits

    assert values(network) == values(Logits())
    with pytest.raises(af.InputError, match="got BaseModelOutputWithPooling with last_hidden_state, pooler_output"):
        values(transformers.ViTModel(config))


def test_a_number_for_each_image() -> None:
    """[n] is [n, 1]."""
    one = values(Network(lambda y: y.squeeze(-1), outputs=1))
    assert one == values(Network(lambda y: y, outputs=1))
    theta, (u0, u1) = torch.arange(4.0), af.scoring.circle((3, 16, 16))
    assert af.curve(Network(lambda y: y[:, 0]), theta, u0.float(), u1.float()).output.shape == (4, 1)


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (
            lambda y: y.argmax(-1),
            r"must return floating-point numbers \[\d+, ...\] of \d+ images, got \[\d+\] in int64",
        ),
        (lambda y: y.t(), r"of \d+ images, got \[5, \d+\] in float32"),
        (lambda y: y.reshape(-1), r"of \d+ images, got \[\d+\] in float32"),
        (lambda y: torch.cat([y, y]), r"of \d+ images, got \[\d+, 5\] in float32"),
        (lambda y: y.mean(0, keepdim=True), r"of \d+ images, got \[1, 5\] in float32"),
        (lambda y: y.sum(), r"got \[\] in float32"),
        (lambda y: (y, y), "got tuple with 0, 1: score a module that returns the tensor you mean"),
        (lambda y: "nothing", "got str: score a module"),
    ],
    ids=["integers", "transposed", "flat", "twice", "mean", "scalar", "two", "text"],
)
@pytest.mark.parametrize("metric", METRICS)
def test_what_has_no_scores(put: Any, words: str, metric: str) -> None:
    with pytest.raises(af.InputError, match=words):
        af.score(Network(put), (metric,), **SETTINGS)


def test_features_without_gradients() -> None:
    class Frozen(Network):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    with pytest.raises(af.InputError, match=r"the NTK needs gradients.*torch.no_grad\(\)"):
        af.ntk_gram(Frozen(lambda y: y), torch.randn(4, 3, 16, 16))


class OfOneBatch(Network):
    """Takes six images."""

    def forward(self, x: Tensor) -> Any:
        return self.put(self.head(self.conv(x).tanh().reshape(6, 8, -1).mean(2)))


class Asserting(Network):
    def forward(self, x: Tensor) -> Any:
        assert len(x) == 6, "six images, please"
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")
@pytest.mark.parametrize("kind", [OfOneBatch, Asserting])
def test_networks_with_a_batch_size_of_their_own(kind: type[Network]) -> None:
    images = torch.randn(6, 3, 16, 16)
    found, want = (af.ntk_gram(network(lambda y: y), images) for network in (kind, Network))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-8)
    assert values(kind(lambda y: y), thetas=6)[0] == pytest.approx(values(Network(lambda y: y), thetas=6)[0], rel=1e-6)
    with pytest.raises((RuntimeError, AssertionError), match=r"six images|shape"):
        af.ntk_gram(kind(lambda y: y), images[:5])


def test_a_refused_batch_is_named() -> None:
    with pytest.raises(af.InputError, match="Asserting does not take 10 images of 3 x 16 x 16: six images, please"):
        af.score(Asserting(lambda y: y), ("length_distortion",), **SETTINGS)
