"""Replacements that users add: the public way, its example in the documentation, and ``check_replacement``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny_swin import needs_kernels, swin
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import acceleration
from asvit_fast.acceleration import Replacement, register, registry, unregister

pytestmark = needs_kernels
PAGE = Path(__file__).parent.parent / "docs" / "develop" / "family.md"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])


class WindowMixer(nn.Module):
    """Attention inside windows of 2 x 2 tokens of a map [B, H, W, C], with one head."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.window_size = 2
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        side = self.window_size
        windows = self.qkv(x).view(batch, height // side, side, width // side, side, 3, channels)
        q, k, v = windows.permute(5, 0, 1, 3, 2, 4, 6).flatten(4, 5)  # [B, H/2, W/2, tokens, C] each
        attention = torch.softmax(q @ k.transpose(-2, -1) * channels**-0.5, -1)
        return (attention @ v).unflatten(3, (side, side)).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)


class FastWindowMixer(Replacement, WindowMixer):
    ops = ("window_attention",)
    reads = ("window_size",)
    parts = {"qkv": (nn.Linear,)}  # noqa: RUF012 as users write it
    scale = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return af.ops.window_attention(qkv, 1, (self.window_size,) * 2, scale=self.scale)


class WrongWindowMixer(FastWindowMixer, WindowMixer):
    scale = 0.2


class IdleWindowMixer(FastWindowMixer, WindowMixer):
    def can_run(self) -> bool:
        self.qkv.register_forward_hook(lambda *args: None)
        return super().can_run()


def maps(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(1)) for size in sizes]


def test_example_of_the_documentation(tmp_path, monkeypatch):
    """As a file of its own, as a user has it."""
    path = tmp_path / "quadrants.py"
    path.write_text(PAGE.read_text().partition("```python\n")[2].partition("```")[0])
    spec = importlib.util.spec_from_file_location("quadrants", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quadrants", module)
    spec.loader.exec_module(module)  # runs check_replacement
    network = nn.Sequential(module.QuadrantAttention(32, 2), nn.LayerNorm(32))
    report = af.accelerate(network, strict=True)
    assert type(network[0]) is module.FastQuadrantAttention and report.unknown == ()
    af.restore(network)
    assert type(network[0]) is module.QuadrantAttention


def test_registered_classes_are_given_until_they_are_not():
    assert register(FastWindowMixer, notes="a test") is FastWindowMixer
    report = af.check_replacement(WindowMixer(), maps((4, 6), (8, 2)))
    assert report.swapped[0].replacement == "FastWindowMixer"
    unregister(FastWindowMixer)
    report = af.accelerate(WindowMixer())
    assert [kind.source.rpartition(".")[2] for kind in report.unknown] == ["WindowMixer"]


def test_a_class_that_cannot_be_registered():
    with pytest.raises(af.InputError, match="derived from Replacement is needed, got <class"):
        register(WindowMixer)
    with pytest.raises(af.InputError, match="must also be derived from the class"):
        register(type("Fast", (Replacement,), {}))
    with pytest.raises(af.InputError, match="needs a structure and an origin"):
        register(type("Fast", (acceleration.Structural,), {}))


def test_check_replacement_finds_wrong_numbers():
    register(WrongWindowMixer)
    with pytest.raises(AssertionError, match=r"in torch.float32, mode eval:(.|\n)*MORE THAN ROUNDING"):
        af.check_replacement(WindowMixer(), maps((4, 4)))


def test_check_replacement_finds_a_replacement_that_does_not_run():
    register(IdleWindowMixer)
    with pytest.raises(AssertionError, match=r"did not run: .*its qkv has a forward hook"):
        af.check_replacement(WindowMixer(), maps((4, 4)))


def test_check_replacement_wants_a_swap():
    with pytest.raises(AssertionError, match="Linear was not swapped: no family claims it"):
        af.check_replacement(nn.Linear(8, 8), maps((4, 4)))
    register(FastWindowMixer)
    module = WindowMixer()
    module.qkv = nn.Sequential(module.qkv)
    with pytest.raises(AssertionError, match=r"WindowMixer was not swapped: .*its qkv is a Sequential"):
        af.check_replacement(module, maps((4, 4)))
    with pytest.raises(af.InputError, match="inputs are empty"):
        af.check_replacement(module, [])


def test_check_replacement_of_a_network_of_a_package():
    model = swin()
    report = af.check_replacement(model, torch.randn(1, 3, 44, 44), dtypes=[torch.float32], modes=["train"])
    assert len(report.swapped) == 28 and not any(isinstance(module, Replacement) for module in model.modules())
