"""A small Swin Transformer of timm that tests of ``accelerate`` share."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from asvit_fast import _extension
from asvit_fast.acceleration.replacement import Replacement

needs_kernels = pytest.mark.skipif(_extension.extension() is None, reason="accelerate takes little without kernels")

SIZE = 44  # maps of 11 x 11 and 6 x 6 tokens: windows of 4 do not divide them


def swin(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    options = {
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "num_classes": 3,
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=SIZE, **options | kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if "bias_table" in name else 0.1) * torch.randn_like(parameter))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def is_fast(model: nn.Module) -> bool:
    return any(isinstance(module, Replacement) for module in model.modules())


def block(model: nn.Module) -> SwinTransformerBlock:
    return model.get_submodule("layers.0.blocks.1")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
