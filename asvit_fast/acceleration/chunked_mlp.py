"""Base class of replacements for feed-forward networks: on a CPU, in inference, tokens go through in parts that
stay in the cache.

A large hidden activation is written to and read from memory that the system has to provide anew every time: the first
blocks of Swin-T spend half of their feed-forward network on that. Every token is on its own, so the network may as well
see a few hundred of them at a time. GELU needs no kernel of its own: on numbers in the cache torch's is fast enough.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from ..ops.transforms import transform_active
from .replacement import Parts, Replacement, call_reason, made_by_package, source_type

LARGE = 16 << 20  # bytes of a hidden activation up to which it is left whole
PART = 2 << 20  # bytes of a part of it, per thread
ACTIVATIONS = (
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid),
    *(nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh),
    *(timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU),
)
TOKENWISE = (nn.Linear, nn.Identity, nn.Dropout, nn.LayerNorm, timm.layers.LayerNorm, *ACTIVATIONS)


def tokens_at_a_time(module: nn.Module, x: Tensor) -> int | None:
    """How many of the tokens x [..., C] make a part; None to leave them together."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dim() < 2 or torch.compiler.is_compiling():
        return None
    if has_torch_function_unary(x) or transform_active() or torch.jit.is_tracing():
        return None
    children = list(module.children())
    if any(isinstance(child, nn.Dropout) and child.training and child.p > 0.0 for child in children):
        return None  # it draws its mask in the order of calls
    width = max((child.out_features for child in children if isinstance(child, nn.Linear)), default=0)
    token = width * x.element_size()  # bytes
    if x.numel() // max(x.shape[-1], 1) * token <= LARGE:
        return None
    return max(PART * torch.get_num_threads() // token, 1)


class ChunkedMlp(Replacement):
    """``forward`` of the source on parts of the tokens."""

    @classmethod
    def bypassed_parts(cls) -> Parts:
        """Every layer is called several times: all that may be there."""
        return {"": TOKENWISE}

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        if any(isinstance(child, nn.Conv2d) for child in module._modules.values()):
            return "it is made of convolutions"
        for name, child in module._modules.items():  # as its package makes it, where it was not changed since
            if made_by_package(child) and source_type(child) not in TOKENWISE:
                return f"its {name} is a {type(child).__name__}"
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
        return None if device in ("cpu", "meta") else f"on {device} parts would not be faster"

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """A layer that looks at several tokens, is not known or whose calls may be seen."""
        for name, child in module._modules.items():
            if source_type(child) not in TOKENWISE:
                return f"its {name} is a {type(child).__name__}"
            why = call_reason(child)
            if why is not None:
                return f"its {name} {why}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        run = super().forward  # type: ignore[misc]
        tokens = tokens_at_a_time(self, x)  # type: ignore[arg-type]
        if tokens is None or not self.can_run():
            return run(x)
        return torch.cat([run(part) for part in x.flatten(0, -2).split(tokens)]).unflatten(0, x.shape[:-1])
