"""The NTK Gram of modules that are unusual in one way each, and that no module is changed by it."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from ntk_modules import MODULES, autocast, build
from ntk_oracle import Of, assert_gram_is_right, linears, parameter, tokens
from torch import Tensor, nn

import asvit_fast as af

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODULES)
def test_gram_of_unusual_modules(name: str) -> None:
    model = build(name)
    for batch in (1, 2, 3):
        assert_gram_is_right(model, torch.randn(batch, 3, 8, 8, dtype=torch.float64))


def test_gram_in_autocast() -> None:
    """A bfloat16 product inside of a float32 network: its rounding is in every row of the comparison."""
    torch.manual_seed(0)
    model = Of(autocast, **linears(first=8, second=8))
    assert_gram_is_right(model, torch.randn(3, 3, 8, 8), 2e-2)


# ------------------------------------------------------------------ no trace


def traces(model: nn.Module) -> dict[str, object]:
    """All that a forward or backward pass could change."""
    found: dict[str, object] = {"random numbers": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, dict):
                value = {key: (id(entry), getattr(entry, "_version", 0)) for key, entry in value.items()}
            elif isinstance(value, (list, set)):
                value = list(map(id, value))
            found[f"{name}.{attribute}"] = value if isinstance(value, (bool, int, str, dict, list)) else id(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} as it is"] = (
            tensor.tolist(),
            tensor.grad,
            tensor.requires_grad,
            tensor._version,
            tensor._backward_hooks,
        )
    return found


class Careless(nn.Module):
    """Does in a forward pass all that a forward pass should not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}
        self.history: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(tokens(x))).mean(1)
        self.calls += 1
        self.cache["last"] = self.last = x
        self.history.append(x)
        self.norm.running_mean.add_(0.1)
        self.extra_weight = x.detach()
        self.register_buffer("late", torch.zeros(2))
        self.norm.eps = 1e-3
        self.linear.requires_grad_(True)
        return F.dropout(self.norm(x), 0.5, training=True)


class Merging(nn.Module):
    """Adds its adapter to its weight, in place, for as long as it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.down_weight, self.up_weight = parameter(8, 8), parameter(2, 8), parameter(8, 2)
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * self.up_weight.data @ self.down_weight.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(x)
        adapted = F.linear(x, self.weight)
        return torch.tanh(adapted if self.merged else adapted + x @ self.down_weight.T @ self.up_weight.T).mean(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name", ["careless", "merging", "levit", "spectral norm by a hook", "running statistics", "cached", "checkpoints"]
)
def test_no_trace_is_left(name: str, training: bool) -> None:
    if name == "careless":
        model: nn.Module = Careless().double()
    elif name == "merging":
        model = Merging().double()
    elif name == "levit":
        model = timm.create_model(
            "levit_128s", img_size=32, embed_dim=(32, 32, 32), key_dim=8, depth=(1, 1, 1)
        ).double()
    else:
        model = build(name)
    model.train(training)
    images = torch.randn(2, 3, 32 if name == "levit" else 8, 32 if name == "levit" else 8, dtype=torch.float64)
    expected = traces(model)
    before = {key: id(value) for key, value in vars(model).items()}
    af.ntk_gram(model, images, "all")
    af.score(model, img_size=images.shape[2], thetas=2, repeats=2, batch=2, seed=3)
    assert traces(model) == expected
    assert {key: id(value) for key, value in vars(model).items()} == before
