"""Kernels that an accelerated Swin block starts in a forward and backward pass, and that the host waits for nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from kernel_counts import Kernels, counted
from torch import nn

import asvit_fast as af
from asvit_fast.ops import packed_linear

pytest.importorskip("triton")
timm = pytest.importorskip("timm")

TORCH = Counter(  # of a block without attention, and of the projections: 26
    {"native_layer_norm": 2, "native_layer_norm_backward": 2, "gelu": 1, "gelu_backward": 1, "add": 4}
    | {"addmm": 4, "mm": 8, "sum": 4}
)
# of attention; the last casts the bias' gradient, where its table is in 16 bits
SINGLE_TILE = Counter({
    "position_bias_kernel": 1, "window_attention_single_tile_kernel": 1,
    "window_attention_single_tile_backward_kernel": 1, "sum": 1, "_to_copy": 1, "position_bias_gradient_kernel": 1,
})  # fmt: skip
PADDING = Counter({"new_zeros": 1, "zeros_like": 1, "sum": 1, "copy_": 1, "add": 1})  # gradient of its projection
ON_CPU = Counter({"new_zeros": 1})  # statistics that are not there on a GPU


def timm_block(size: int) -> nn.Module:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=4 * size, drop_path_rate=0.0, depths=(2, 2))
    return model.layers[0].blocks[1]  # shifted


def torchvision_block(size: int) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    return swin.SwinTransformerBlock(96, 3, [7, 7], [3, 3], attn_layer=swin.ShiftedWindowAttention)


def training_pass(block: nn.Module, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """What a pass of an accelerated block starts."""
    monkeypatch.setattr(packed_linear, "_library", lambda own, dtype: None)  # Linear layers are torch's on a GPU
    model = nn.Sequential(block).to(dtype)
    assert af.accelerate(model).swapped
    x = torch.randn(1, size, size, 96, dtype=dtype, requires_grad=True)
    with counted(monkeypatch) as kernels:
        output = model(x)
        torch.autograd.grad(output, [x, *model.parameters()], torch.empty_like(output))
    return kernels


@pytest.mark.parametrize("make", [timm_block, torchvision_block])
def test_swin_block(make, monkeypatch):
    """Six for attention, in 16 bits with windows that divide the map."""
    kernels = training_pass(make(14), 14, torch.bfloat16, monkeypatch)
    assert kernels.counts() == TORCH + SINGLE_TILE + ON_CPU
    assert kernels.waited == [] and len(kernels.allocated) <= 9


def test_padded_block(monkeypatch):
    kernels = training_pass(timm_block(16), 16, torch.bfloat16, monkeypatch)
    assert kernels.counts() == TORCH + SINGLE_TILE + PADDING + ON_CPU and kernels.waited == []


def test_float32_block(monkeypatch):
    """Nothing is cast, and larger tiles do with what the backward pass needs besides."""
    counts = training_pass(timm_block(14), 14, torch.float32, monkeypatch).counts()
    ours = {name: number for name, number in (counts - TORCH).items() if name.endswith("_kernel")}
    assert set((counts - TORCH) - Counter(ours)) == {"sum"} and sum(ours.values()) <= 6


def test_no_wait_of_ops(monkeypatch):
    """Forward and backward of every op with Triton kernels."""
    x, weight = torch.randn(1, 8, 8, 4, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    image, patch = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(8, 3, 4, 4, requires_grad=True)
    ones = torch.ones(16, requires_grad=True)
    calls = (
        lambda: af.ops.window_attention((x, x, x), 2, (3, 3), (1, 1), torch.randn(2, 9, 9), ones[:2], layout="timm"),
        lambda: af.ops.window_attention((x, x, x), 2, (2, 2), kv_window=(4, 4)),
        lambda: af.ops.patch_merge(x, weight, 2, 2, ones),
        lambda: af.ops.patch_embed(image, patch, None, 4, 1, (0, 0, 0, 0), ones[:8]),
        lambda: af.ops.gelu_taylor(x),
        lambda: af.ops.square_taylor(x),
    )
    for call in calls:
        with counted(monkeypatch) as kernels:
            output = call()
            if output.requires_grad:
                output.backward(torch.empty_like(output))
        assert kernels.waited == [] and any(name.endswith("_kernel") for name in kernels.started)
