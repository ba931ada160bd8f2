"""Attributes that a fused path goes by, changed before ``accelerate`` or after: what comes out is the source's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_accelerate_families import MODELS, image, prepared
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast.acceleration.replacement import Replacement

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore::asvit_fast.backends.FallbackWarning")]


def assign(path: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute, to a value or to what a function makes of the present one."""
    owner, _, name = path.rpartition(".")

    def change(module: nn.Module) -> None:
        target = module.get_submodule(owner)
        setattr(target, name, value(getattr(target, name)) if inspect.isfunction(value) else value)

    return change


def zero_mask(block: Any) -> None:
    block.attn_mask.zero_()


def turn_mask(block: Any) -> None:
    """Masks of a map with other proportions and as many windows."""
    rows, columns = block.input_resolution
    block.input_resolution = (rows // 2, columns * 2)
    block._init_buffers()


def moved_windows(block: Any) -> None:
    """All of it consistently."""
    block.shift_size = (1, 2)
    block._init_buffers()


def drop_by_the_mode_of_the_attention(block: Any) -> None:
    """As timm does where it fuses."""
    block.attn.fused_attn = block.attn.training = True
    block.attn.attn_drop.p = 1.0


def learned_scale(block: Any) -> None:
    attn = getattr(block, "attn", block)
    attn.scale = nn.Parameter(torch.tensor(0.7))


DIM = ("attn.softmax.dim", -2)
SHIFTS = [
    ("attn_mask", lambda mask: mask * 0.01),
    ("attn_mask", None),
    ("shift_size", (1, 2)),
    ("shift_size", [1, 2]),
    ("shift_size", (0, 0)),
]
NAMED = {
    "mask in place": zero_mask,
    "mask of another map": turn_mask,
    "all of the shift": moved_windows,
    "learned scale": learned_scale,
    "modes": drop_by_the_mode_of_the_attention,
}
# model: class of the source, changes of an instance of it
CHANGES: dict[str, tuple[str, list[Any]]] = {
    "swin": (
        "SwinTransformerBlock",
        [("attn.softmax", nn.Softmax(-2)), DIM, ("attn.scale", 1.0), *SHIFTS, *NAMED],
    ),
    "swinv2": ("SwinTransformerV2Block", [DIM, *SHIFTS, "mask in place", "mask of another map", "all of the shift"]),
    "swinv2_cr": ("SwinTransformerV2CrBlock", [*SHIFTS, "mask in place", "all of the shift"]),
    "davit": ("SpatialBlock", [DIM, ("attn.scale", 1.0), ("window_size", (2, 4)), "learned scale"]),
    "maxvit tf": (
        "PartitionAttentionCl",
        [("attn.scale", 1.0), ("partition_block", lambda block: not block), "learned scale"],
    ),
    "tiny_vit padded": ("TinyVitBlock", [("attn.scale", 1.0), "learned scale"]),
    "twins": ("LocallyGroupedAttn", [("scale", 1.0), ("ws", 2), "learned scale"]),
    "nest": ("Attention", [("scale", 1.0), ("scale", float("nan")), "learned scale"]),
    "pvt_v2": ("OverlapPatchEmbed", [("norm.eps", 0.5), ("proj.padding", (2, 1)), ("proj.dilation", (2, 2))]),
    "torchvision": (
        "ShiftedWindowAttention",
        [("shift_size", [1, 2]), ("shift_size", [5, 4]), ("shift_size", [-1, 1])],
    ),
    "torchvision v2": ("ShiftedWindowAttentionV2", [("shift_size", [1, 2]), ("shift_size", [5, 4])]),
}
CASES = [(name, kind, change) for name, (kind, changes) in CHANGES.items() for change in changes]


def apply(model: nn.Module, kind: str, change: Any) -> None:
    """To the last instance of a class, which has a shift if one has."""
    function = NAMED[change] if isinstance(change, str) else assign(*change)
    modules = [m for m in model.modules() if (getattr(m, "source", None) or type(m)).__name__ == kind]
    shifted = [m for m in modules if getattr(m, "attn_mask", None) is not None]
    function((shifted or modules)[-1])


def outcome(model: nn.Module, x: Tensor) -> Tensor | str:
    """Its output, or which error it raises."""
    torch.manual_seed(0)
    try:
        return model(x).detach()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize(("name", "kind", "change"), CASES)
def test_changes_are_noticed(name: str, kind: str, change: Any) -> None:
    make, size, _ = MODELS[name]
    model, x = prepared(make).eval(), image(size)[:1]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # such attention reads more attributes
    early, late = copy.deepcopy(model), copy.deepcopy(model)
    af.accelerate(late)
    assert any(isinstance(m, Replacement) and m.source.__name__ == kind for m in late.modules())
    late(x)
    for network in (model, early, late):
        apply(network, kind, change)
    af.accelerate(early)
    expected = outcome(model, x)
    for network in (early, late):
        actual = outcome(network, x)
        if isinstance(expected, str):
            assert actual == expected
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
