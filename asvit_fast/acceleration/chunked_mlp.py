"""Base class of replacements for feed-forward networks on a CPU, in inference: GELU is part of the product before it,
and tokens go through in parts.

A large hidden activation is written to and read from memory that the system has to provide anew every time: the first
blocks of Swin-T spend half of their feed-forward network on that. Every token is on its own, so the network may as well
see a few hundred of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, ClassVar

import timm.layers
import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_unary

from ..nn.linear import Linear as OurLinear
from ..ops.linear import linear
from ..ops.packed_linear import ONEDNN, library
from ..ops.transforms import transform_active
from .norm_linear import linear_of_norm, parts_of_norm
from .replacement import Names, Parts, Replacement, call_reason, made_by_package, source_type

LARGE = 16 << 20  # bytes of a hidden activation up to which it is left whole
LARGE_OF_OURS = 64 << 20  # the same where it is our kernel's, which gets memory that was used before
PART = 2 << 20  # bytes of a part of it, per thread
ACTIVATIONS = (
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid),
    *(nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh),
    *(timm.layers.GELU, timm.layers.GELUTanh, timm.layers.QuickGELU),
)
TOKENWISE = (nn.Linear, OurLinear, nn.Identity, nn.Dropout, nn.LayerNorm, timm.layers.LayerNorm, *ACTIVATIONS)
TRACES_LAYERS = torch.__version__ >= "2.14"  # torch 2.11's compiler takes no layers as arguments of a question
ACTIVATION_MODULE = "transformers.activations"  # Hugging Face's own: functions of single numbers


def is_tokenwise(layer: nn.Module) -> bool:
    """Whether a layer is known to look at one token at a time."""
    return source_type(layer) in TOKENWISE or type(layer).__module__ == ACTIVATION_MODULE


def is_plain_inference(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether tokens x [..., C] may go through layers in parts: on a CPU, no gradient, tracer or random number."""
    return not torch.compiler.is_compiling() and is_inference(layers, x)


def is_inference(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """The same, or a graph for that is being compiled."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dim() < 2:
        return False
    if has_torch_function_unary(x) or transform_active() or torch.jit.is_tracing():
        return False
    # dropout draws its mask in the order of calls
    return not any(isinstance(layer, nn.Dropout) and layer.training and layer.p > 0.0 for layer in layers)


def tokens_at_a_time(layers: Sequence[nn.Module], x: Tensor) -> int | None:
    """How many of the tokens x [..., C] make a part for layers that they go through; None to leave them together."""
    if not is_plain_inference(layers, x):
        return None
    width = max((layer.out_features for layer in layers if isinstance(layer, nn.Linear)), default=0)
    token = width * x.element_size()  # bytes
    large = LARGE if library(x.dtype) in (None, ONEDNN) else LARGE_OF_OURS
    if x.numel() // max(x.shape[-1], 1) * token <= large:
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


def run_layers(
    layers: Sequence[nn.Module], x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None
) -> Tensor:
    """A norm, tokenwise layers in their order, and the residual: x [..., C], residual [..., out] -> [..., out]. GELU is
    part of the product of the Linear before it, and so are the norm before a first Linear and the residual after a last
    one."""
    todo = [layer for layer in layers if not isinstance(layer, (nn.Identity, nn.Dropout))]
    skip = False
    if norm is not None and not (len(todo) > 1 and isinstance(todo[0], nn.Linear)):
        x, norm = norm(x), None
    for layer, following in pairwise([*todo, None]):
        if skip:
            skip = False
        elif isinstance(layer, nn.Linear):
            skip = is_exact_gelu(following)
            activation, added = "gelu" if skip else "none", residual if following is None else None
            if norm is None:
                x = linear(x, layer.weight, layer.bias, activation, added)
            else:  # of the first layer
                x, norm = linear_of_norm(norm, x, layer, activation), None
        else:
            x = layer(x)  # type: ignore[misc]
    return x if residual is None or (todo and isinstance(todo[-1], nn.Linear)) else residual + x


@torch.compiler.assume_constant_result  # questions about classes
def is_exact_gelu(layer: nn.Module | None) -> bool:
    """Not one of its approximations."""
    if type(layer).__module__ == ACTIVATION_MODULE:
        return type(layer).__name__ == "GELUActivation" and getattr(layer, "act", None) is nn.functional.gelu
    return source_type(layer) in (nn.GELU, timm.layers.GELU) and getattr(layer, "approximate", "none") == "none"


class ChunkedMlp(Replacement):
    """``forward`` of the source on parts of the tokens."""

    order: ClassVar[Names] = ()  # of the layers that its source calls one after the other, but for dropout

    def _in_order(self: Any) -> list[nn.Module]:
        """The layers that its source calls; none if it is not known how."""
        return [self._modules[name] for name in self.order]

    @classmethod
    def bypassed_parts(cls) -> Parts:
        """Every layer is called several times: all that may be there."""
        return {"": TOKENWISE}

    @torch.compiler.assume_constant_result
    def _paths(self: Any) -> tuple[str, ...]:
        return tuple(self._modules)

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
        return self._run(x)

    def onto(self, x: Tensor, norm: nn.Module) -> Tensor:
        """x + self(norm(x))."""
        return self._run(x, x, norm)

    def _run(self, x: Tensor, residual: Tensor | None = None, norm: nn.Module | None = None) -> Tensor:
        if norm is not None and parts_of_norm(norm) is None:  # whoever sees it, or what it does, wants all tokens
            x, norm = norm(x), None
        layers: list[nn.Module] = list(self.children())  # type: ignore[attr-defined]
        run: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]
        traced = torch.compiler.is_compiling()
        if (TRACES_LAYERS or not traced) and is_inference(layers, x) and self.can_run():
            in_order = self._in_order()
            tokens = tokens_at_a_time(layers, x)
            if in_order and library(x.dtype) is not None:
                if tokens is None:
                    return run_layers(in_order, x, residual, norm)
                run, norm = partial(run_layers, in_order, norm=norm), None
            if tokens is not None:
                run = partial(run_in_parts, run, tokens=tokens)
        y = run(x if norm is None else norm(x))
        return y if residual is None else residual + y
