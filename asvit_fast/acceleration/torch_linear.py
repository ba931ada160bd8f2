"""Replacement for torch's Linear layers on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.linear import is_small, linear
from ..ops.packed_linear import library
from ..ops.transforms import autocast_dtype
from .replacement import Replacement, patch_reason

torch.fx.wrap("linear")  # a graph of torch.fx calls it, too, and gets the same numbers


class FastLinear(Replacement, nn.Linear):
    """The same numbers, sooner, on a CPU; torch's own product otherwise."""

    ops = ("linear",)

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        weight = module._parameters.get("weight")
        if weight is None or weight.is_meta:
            return None
        if weight.layout != torch.strided:
            return f"its weight is {str(weight.layout).removeprefix('torch.')}"
        if weight.device.type != "cpu" or library(weight.dtype) is None:
            return f"on {weight.device.type} in {str(weight.dtype).removeprefix('torch.')} torch's product is as fast"
        return None

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            dtype = autocast_dtype("cpu")  # an op's host time is more than it gains on a small product
            small = type(input) is Tensor and is_small(input, self.weight, dtype)
            if small or patch_reason(type(self), self) is not None:
                return super().forward(input)
        return linear(input, self.weight, self.bias)
