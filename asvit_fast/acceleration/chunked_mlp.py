"""Base class of replacements for feed-forward networks: on a CPU, in inference, tokens go through in parts that
stay in the cache.

A large hidden activation is written to and read from memory that the system has to provide anew every time: the first
blocks of Swin-T spend half of their feed-forward network on that. Every token is on its own, so the network may as well
see a few hundred of them at a time. GELU needs no kernel of its own: on numbers in the cache torch's is fast enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
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
ACTIVATION_MODULE = "transformers.activations"  # Hugging Face's own: functions of single numbers


def is_tokenwise(layer: nn.Module) -> bool:
    """Whether a layer is known to look at one token at a time."""
    return source_type(layer) in TOKENWISE or type(layer).__module__ == ACTIVATION_MODULE


def tokens_at_a_time(layers: Sequence[nn.Module], x: Tensor) -> int | None:
    """How many of the tokens x [..., C] make a part for layers that they go through; None to leave them together."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dim() < 2 or torch.compiler.is_compiling():
        return None
    if has_torch_function_unary(x) or transform_active() or torch.jit.is_tracing():
        return None
    if any(isinstance(layer, nn.Dropout) and layer.training and layer.p > 0.0 for layer in layers):
        return None  # it draws its mask in the order of calls
    width = max((layer.out_features for layer in layers if isinstance(layer, nn.Linear)), default=0)
    token = width * x.element_size()  # bytes
    if x.numel() // max(x.shape[-1], 1) * token <= LARGE:
        return None
    return max(PART * torch.get_num_threads() // token, 1)


def run_in_parts(run: Callable[[Tensor], Tensor], x: Tensor, tokens: int) -> Tensor:
    """A function of single tokens x [..., C] on that many at a time."""
    parts = (run(part) for part in x.flatten(0, -2).split(tokens))
    first = next(parts)
    result = first.new_empty(*x.shape[:-1], first.shape[-1])  # parts put together at the end would be there twice
    for into, part in zip(result.flatten(0, -2).split(tokens), chain([first], parts), strict=True):
        into.copy_(part)
    return result


def visible_reason(layers: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why layers, by name, must be called once: one looks at several tokens, is not known, or its calls may be seen."""
    for name, layer in layers:
        if not is_tokenwise(layer):
            return f"its {name} is a {type(layer).__name__}"
        why = call_reason(layer)
        if why is not None:
            return f"its {name} {why}"
    return None


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
            if made_by_package(child) and not is_tokenwise(child):
                return f"its {name} is a {type(child).__name__}"
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
        return None if device in ("cpu", "meta") else f"on {device} parts would not be faster"

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        return visible_reason(module._modules.items())

    def forward(self, x: Tensor) -> Tensor:
        run = super().forward  # type: ignore[misc]
        tokens = tokens_at_a_time(list(self.children()), x)  # type: ignore[attr-defined]
        return run(x) if tokens is None or not self.can_run() else run_in_parts(run, x, tokens)
