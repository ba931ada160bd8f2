"""The replacements of code that is no package, on re-statements of its interfaces (``restated_swin``): registered for
the test with the digests of these. ``test_accelerate_sources`` has the code itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import restated_swin as restated
import torch
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration import method_digest, register, registry
from asvit_fast.acceleration.image_restoration import (
    FastHybridAttentionBlock,
    FastOverlappingCrossAttention,
    FastSwinIRBlock,
)
from asvit_fast.acceleration.microsoft_detection import FastBackboneBlock, FastBackboneStage
from asvit_fast.acceleration.microsoft_swin import FastMicrosoftSwinBlock, FastMicrosoftSwinV2Block
from asvit_fast.acceleration.mm_swin import (
    FastPretrainShiftWindowMSA,
    FastPretrainShiftWindowMSAV2,
    FastShiftWindowMSA,
)
from asvit_fast.acceleration.structure import Structural
from asvit_fast.acceleration.video_swin import FastVideoSwinBlock, FastVideoSwinStage

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setattr(backends, "_notified", set())


def known_as(replacement: type[Structural], module: nn.Module) -> None:
    """Registers a replacement for the code of a module."""
    structure = {
        path: {name: (method_digest(type(module.get_submodule(path)), name),) for name in methods}
        for path, methods in replacement.structure.items()
    }
    register(type(replacement.__name__, (replacement,), {"structure": structure}))


def tokens(*sizes: int) -> Tensor:
    return torch.randn(2, *sizes, 8, generator=torch.Generator().manual_seed(1))


def mask(size: tuple[int, int]) -> Tensor:
    return restated.shift_mask(list(size), [4, 4], [2, 2])


class With(nn.Module):
    """A module that is called with further arguments, which stay."""

    def __init__(self, module: nn.Module, *arguments: Any):
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, *self.arguments)


INDEX, AROUND = restated.offsets([4, 4], [4, 4]), restated.offsets([4, 4], [6, 6])


def backbone() -> nn.Module:
    block = restated.Backbone(8, 4, 2)
    block.H, block.W = 7, 10
    return block


Case = tuple[Any, Callable[[], nn.Module], list[Any]]
CASES: dict[str, Case] = {
    "Swin": (FastMicrosoftSwinBlock, lambda: restated.Sized(8, (8, 12), 4, 2), [tokens(96)]),
    "Swin, one window": (FastMicrosoftSwinBlock, lambda: restated.Sized(8, (4, 4), 4, 0), [tokens(16)]),
    "Swin V2": (FastMicrosoftSwinV2Block, lambda: restated.SizedV2(8, (8, 12), 4, 2), [tokens(96)]),
    "SwinIR": (
        FastSwinIRBlock,
        lambda: restated.AnySize(8, (8, 8), 4, 2),
        [(tokens(64), (8, 8)), (tokens(96), (8, 12)), (tokens(16), (4, 4))],
    ),
    "backbone": (FastBackboneBlock, backbone, [(tokens(70), mask((7, 10)))]),
    "HAB": (
        FastHybridAttentionBlock,
        lambda: restated.Hybrid(8, 4, 2),
        [(tokens(96), (8, 12), INDEX, mask((8, 12)))],
    ),
    "OCAB": (
        FastOverlappingCrossAttention,
        lambda: restated.Overlapping(8, 4, 6),
        [(tokens(96), (8, 12), AROUND), (tokens(16), (4, 4), AROUND)],
    ),
    "mmdetection": (
        FastShiftWindowMSA,
        lambda: restated.Shifted(8, 4, 2),
        [(tokens(99), (9, 11)), (tokens(12), (3, 4))],
    ),
    "mmpretrain": (
        FastPretrainShiftWindowMSA,
        lambda: restated.SmallMaps(8, 4, 2),
        [(tokens(99), (9, 11)), (tokens(44), (4, 11))],
    ),
    "mmpretrain V2": (
        FastPretrainShiftWindowMSAV2,
        lambda: restated.SmallMaps(8, 4, 2, restated.CosineAttention),
        [(tokens(99), (9, 11)), (tokens(44), (4, 11))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_its_source(name):
    replacement, make, inputs = CASES[name]
    torch.manual_seed(1)  # of a few numbers in bfloat16 the errors are luck, of both
    module = make()
    known_as(replacement, module)
    samples = [sample if isinstance(sample, tuple) else (sample,) for sample in inputs]
    for x, *arguments in samples:
        report = af.check_replacement(With(module, *arguments), x)
    assert replacement.__name__ in {decision.replacement for decision in report.swapped}
    assert report.unknown == ()


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_rounding_in_float64(name):
    """Far below what a wrong mask, padding or order of channels would make."""
    replacement, make, inputs = CASES[name]
    torch.manual_seed(0)
    module = make().double().eval()
    known_as(replacement, module)
    for sample in inputs:
        x, *others = sample if isinstance(sample, tuple) else (sample,)
        expected = module(x.double(), *others)
        af.accelerate(module)
        torch.testing.assert_close(module(x.double(), *others), expected, rtol=1e-10, atol=1e-10)
        af.restore(module)


@pytest.mark.parametrize("size", [(4, 8, 8), (5, 7, 6), (2, 3, 9)])
def test_video(size):
    """Windows that divide the video, that do not, and that are larger than it along some axes."""
    torch.manual_seed(0)
    stage = restated.VideoStage(8, (2, 4, 4))
    known_as(FastVideoSwinBlock, stage.blocks[0])
    known_as(FastVideoSwinStage, stage)
    report = af.check_replacement(stage, torch.randn(1, 8, *size))
    fast = [decision.replacement for decision in report.swapped if "Video" in str(decision.replacement)]
    assert fast == ["FastVideoSwinStage", "FastVideoSwinBlock", "FastVideoSwinBlock"]


def fast_stage() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    stage = restated.Stage(8, 4)
    known_as(FastBackboneBlock, stage.blocks[0])
    known_as(FastBackboneStage, stage)
    return stage.eval(), tokens(70)


def test_a_stage_makes_no_mask(monkeypatch):
    stage, x = fast_stage()
    report = af.check_replacement(stage, (x, 7, 10))
    assert report.swapped[0].replacement == "FastBackboneStage"
    af.accelerate(stage)
    monkeypatch.setattr(restated, "shift_mask", None)
    stage(x, 7, 10)


def test_a_block_that_runs_its_source_gets_a_mask():
    """The stage hands it none of numbers; made from what it stands for, they are the source's."""
    stage, x = fast_stage()
    expected = stage(x, 7, 10)[0]
    af.accelerate(stage)
    stage.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    with pytest.warns(backends.FallbackWarning, match=r"its attn.qkv has a forward hook"):
        torch.testing.assert_close(stage(x, 7, 10)[0], expected)


def test_hooks_on_blocks_see_the_mask():
    stage, x = fast_stage()
    af.accelerate(stage)
    seen = []
    stage.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with pytest.warns(backends.FallbackWarning, match=r"its blocks.0 has a forward pre-hook"):
        stage(x, 7, 10)
    assert torch.equal(seen[0], mask((7, 10)))


def test_another_mask_runs_the_source():
    module = backbone()
    known_as(FastBackboneBlock, module)
    x, other = tokens(70), -torch.rand(6, 16, 16)
    expected = module(x, other)
    af.accelerate(module)
    with pytest.warns(backends.FallbackWarning, match="the mask that it is called with is not that of its shift"):
        torch.testing.assert_close(module(x, other), expected)


def test_a_mask_that_wants_a_gradient_gets_it():
    module = backbone()
    known_as(FastBackboneBlock, module)
    wanted = mask((7, 10)).requires_grad_()
    af.accelerate(module)
    with pytest.warns(backends.FallbackWarning, match="the mask that it is called with wants a gradient"):
        module(tokens(70), wanted).sum().backward()
    assert wanted.grad is not None


def test_shapes_that_do_not_fit():
    module = restated.Sized(8, (8, 8), 4, 2)
    known_as(FastMicrosoftSwinBlock, module)
    module.attn.window_size = (2, 2)
    (left,) = af.accelerate(module).left
    assert left.reason == "its windows are (4, 4), those of its attention (2, 2)"
    module.attn.window_size = (4, 4)
    module.attn.relative_position_index = module.attn.relative_position_index[:4, :4]
    (left,) = af.accelerate(module).left
    assert left.reason == "its relative_position_index is [4, 4] for windows of 16 tokens"
