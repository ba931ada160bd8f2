"""Per-sample gradients of a layer's parameters from its input and the gradient of its output: rules by torch function.

Large gradients are formed a piece at a time and multiplied while the cache has the piece; where few tokens meet a large
weight, products of pairs of tokens give the Gram matrix without forming a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from .. import _extension
from ..ops.linear import linear
from ..taylor.value import function_name

PIECE = 2**21  # gradients to form at a time on a CPU: 8 MB of float32 stay in the last level of cache
SHORT = 2**16  # gradients to convert to float64 at a time: 512 KB stay in a core's own cache


def _has_kernel(x: Tensor) -> bool:
    """Whether our kernels (csrc/per_sample.h) take x and are faster than torch's products."""
    extension = _extension.extension()
    of_type = x.is_cpu and x.dtype in (torch.float32, torch.float64)
    return of_type and extension is not None and extension.prefers_own_products()


def gram_of_rows(rows: Tensor) -> Tensor:
    """rows [B, n] -> rows @ rows.T [B, B] in float64: sums in float32 would blur the small eigenvalues."""
    if _has_kernel(rows):
        return torch.ops.asvit_fast_C.gram(rows.contiguous())
    if rows.dtype == torch.float64 or rows.device.type != "cpu":
        rows = rows.double()
        return rows @ rows.T
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for short in rows.split(max(1, SHORT // len(rows)), 1):  # converted where the cache has it
        short = short.double()
        gram.addmm_(short, short.T)
    return gram


@dataclass(frozen=True)
class Contraction:
    """A way from the gradient of a call's output to those of one parameter."""

    rows: Callable[[Tensor], Iterable[Tensor]]  # gradient rows [B, parameter] in pieces [B, n], from left to right
    gram: Callable[[Tensor], Tensor] | None = None  # their Gram matrix [B, B], float64, where that is cheaper


@dataclass(frozen=True)
class Known:
    """A call of a function that has a rule."""

    contractions: dict[int, Contraction]  # by parameter id
    rows: int  # of each sample in the call's input and output
    forward: Callable[[], Tensor] | None = None  # to run instead of the function


def named(args: Any, kwargs: Any, *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _contractions(*pairs: tuple[Any, Callable[[Tensor], Tensor]]) -> dict[int, Contraction]:
    """Contractions of parameters small enough for rows [B, parameter] in one piece."""

    def one_piece(rows: Callable[[Tensor], Tensor]) -> Contraction:
        return Contraction(lambda gradient: [rows(gradient)])

    return {id(parameter): one_piece(rows) for parameter, rows in pairs if isinstance(parameter, nn.Parameter)}


def _parts(outputs: int, inputs: int, like: Tensor, samples: int) -> Iterable[slice]:
    """Cuts a weight [outputs, inputs] so that the gradient rows of a part are PIECE numbers on a CPU."""
    step = max(1, PIECE // (samples * inputs)) if like.device.type == "cpu" else outputs
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))


def _linear_weight(x: Tensor, samples: int) -> Contraction:
    """x [B*n, ..., in], the input of a product with weight [out, in]."""
    x = x.detach().reshape(samples, -1, x.shape[-1])  # [B, T, in]

    def rows(gradient: Tensor) -> Iterable[Tensor]:
        g = gradient.reshape(*x.shape[:2], -1).transpose(1, 2)  # [B, out, T]
        return (
            torch.bmm(g[:, part], x).flatten(1)  # [B, part*in]
            for part in _parts(g.shape[1], x.shape[2], x, samples)
        )

    def gram(gradient: Tensor) -> Tensor:
        g = gradient.reshape(*x.shape[:2], -1)  # [B, T, out]
        tokens, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
        if samples * tokens * (inputs + outputs) >= 2 * inputs * outputs:
            if _has_kernel(g) and x.dtype == g.dtype:
                return torch.ops.asvit_fast_C.linear_weight_gram(x.contiguous(), g.contiguous())
            return sum((gram_of_rows(piece) for piece in rows(gradient)), g.new_zeros((), dtype=torch.float64))
        pairs_of_x, pairs_of_g = (a @ a.T for a in (x.flatten(0, 1).double(), g.flatten(0, 1).double()))  # [B*T, B*T]
        return (pairs_of_x * pairs_of_g).reshape(samples, tokens, samples, tokens).sum((1, 3))

    return Contraction(rows, gram)


def _linear(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, weight, bias = named(args, kwargs, "input", "weight", "bias")
    if x.dim() < 2 or x.shape[0] % samples or weight.dim() != 2:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:  # one that is added to other sizes as well
        return None
    known = _contractions((bias, lambda gradient: gradient.reshape(samples, -1, gradient.shape[-1]).sum(1)))
    if isinstance(weight, nn.Parameter):
        known[id(weight)] = _linear_weight(x, samples)
    weight, bias = (p.detach() if isinstance(p, nn.Parameter) else p for p in (weight, bias))
    forward = partial(linear, x, weight, bias)
    return Known(known, x.shape[0] // samples, forward)


def _padded(x: Tensor, kernel: tuple[int, ...], dilation: int | tuple[int, ...]) -> Tensor:
    """x [B, C, H, W] with the zeros of padding="same": an odd one goes to the end."""
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    total = [step * (size - 1) for step, size in zip(steps, kernel, strict=True)]
    (top, bottom), (left, right) = ((zeros // 2, zeros - zeros // 2) for zeros in total)
    return F.pad(x, (left, right, top, bottom))


def _conv2d(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, weight, bias, stride, padding, dilation, groups = named(
        args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if x.dim() != 4 or x.shape[0] % samples:
        return None
    x, shape, groups = x.detach(), tuple(weight.shape), groups or 1
    if isinstance(padding, str):
        x, padding = _padded(x, shape[2:], dilation or 1) if padding == "same" else x, 0

    def rows(gradient: Tensor) -> Iterable[Tensor]:
        """Sample by sample and, without groups, some output channels at a time."""
        inputs = math.prod(shape[1:])
        parts = _parts(shape[0], inputs, x, samples) if groups == 1 else [slice(0, shape[0])]
        for part in parts:
            weights = (part.stop - part.start, *shape[1:])
            yield torch.stack(
                [
                    conv2d_weight(x_j, weights, g_j, stride or 1, padding or 0, dilation or 1, groups).flatten()
                    for x_j, g_j in zip(x.chunk(samples), gradient[:, part].chunk(samples), strict=True)
                ]  # x_j [n, C, H, W], g_j [n, part, Ho, Wo]
            )

    known = _contractions((bias, lambda gradient: gradient.sum((2, 3)).reshape(samples, -1, shape[0]).sum(1)))
    if isinstance(weight, nn.Parameter):
        known[id(weight)] = Contraction(rows)
    return Known(known, x.shape[0] // samples)


def _layer_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, shape, weight, bias, eps = named(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    if x.dim() <= len(shape) or x.shape[0] % samples:
        return None
    scale, shift = (p.detach() if isinstance(p, nn.Parameter) else p for p in (weight, bias))
    statistics: list[Tensor] = []  # mean and 1 / standard deviation, [B*n, ..., 1]

    def forward() -> Tensor:
        out, *rest = torch.native_layer_norm(x, shape, scale, shift, 1e-5 if eps is None else eps)
        statistics[:] = rest
        return out

    def by_token(values: Tensor) -> Tensor:
        """[B*n, ..., parameter] -> [B, T, parameter]."""
        return values.detach().reshape(samples, -1, math.prod(shape)).contiguous()

    def of_weight(gradient: Tensor) -> Tensor:
        given, g = by_token(x), by_token(gradient)
        mean, inverse_std = (values.reshape(samples, -1) for values in statistics)  # [B, T]
        if _has_kernel(given) and given.dtype == g.dtype:
            return torch.ops.asvit_fast_C.layer_norm_weight_rows(given, mean, inverse_std, g)
        return (g * ((given - mean[:, :, None]) * inverse_std[:, :, None])).sum(1)  # [B, parameter]

    known = _contractions((weight, of_weight), (bias, lambda gradient: by_token(gradient).sum(1)))
    return Known(known, x.shape[0] // samples, forward)


def _of_channels(
    weight: Any, bias: Any, x: Tensor, samples: int, normalise: Callable[[Tensor], Tensor]
) -> Known | None:
    """normalise(x) * weight + bias with x [B*n, C, ...], a weight and a bias per channel."""
    if x.dim() < 2 or x.shape[0] % samples:
        return None
    x = x.detach()

    def sums(values: Tensor) -> Tensor:
        return values.reshape(samples, -1, *values.shape[1:]).transpose(1, 2).flatten(2).sum(2)  # [B, C]

    contractions = _contractions((weight, lambda gradient: sums(gradient * normalise(x))), (bias, sums))
    return Known(contractions, x.shape[0] // samples)


def _batch_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, mean, var, weight, bias, training, _, eps = named(
        args, kwargs, "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    )
    if training or mean is None:
        return None
    eps = 1e-5 if eps is None else eps
    return _of_channels(weight, bias, x, samples, lambda x: F.batch_norm(x, mean, var, eps=eps))


def _group_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, groups, weight, bias, eps = named(args, kwargs, "input", "num_groups", "weight", "bias", "eps")
    eps = 1e-5 if eps is None else eps
    return _of_channels(weight, bias, x, samples, lambda x: F.group_norm(x, groups, eps=eps))


def _rms_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, shape, weight, eps = named(args, kwargs, "input", "normalized_shape", "weight", "eps")
    if x.shape[0] % samples or x.dim() <= len(shape):
        return None
    x = x.detach()

    def to_weight(gradient: Tensor) -> Tensor:
        values = gradient * F.rms_norm(x, shape, None, eps)
        return values.reshape(samples, -1, *shape).sum(1).flatten(1)

    return Known(_contractions((weight, to_weight)), x.shape[0] // samples)


def _expand(args: Any, kwargs: Any, samples: int) -> Known | None:
    """A parameter [1, ...] repeated for every sample (a class token)."""
    parameter, *sizes = args
    sizes = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if kwargs or len(sizes) != parameter.dim() or parameter.shape[:1] != (1,) or sizes[0] != samples:
        return None
    shape = parameter.shape
    return Known(
        _contractions((parameter, lambda g: torch.stack([row[None].sum_to_size(shape).flatten() for row in g]))), 1
    )


def _broadcast(args: Any, kwargs: Any, samples: int, multiply: bool) -> Known | None:
    """x + p or x * p with p the same for every sample (a position embedding, a layer scale)."""
    if len(args) < 2 or kwargs or not all(isinstance(a, Tensor) for a in args[:2]):
        return None
    x, parameter = args[:2] if isinstance(args[1], nn.Parameter) else (args[1], args[0])
    same_for_all = parameter.dim() < x.dim() or (parameter.dim() == x.dim() and parameter.shape[:1] == (1,))
    if isinstance(x, nn.Parameter) or not same_for_all or x.shape[0] % samples:
        return None
    x, shape = x.detach(), parameter.shape

    def to_parameter(gradient: Tensor) -> Tensor:
        gradient = gradient * x if multiply else gradient
        per_sample = gradient.reshape(samples, -1, *gradient.shape[1:])
        return torch.stack([g.sum_to_size(shape).flatten() for g in per_sample])

    return Known(_contractions((parameter, to_parameter)), x.shape[0] // samples)


Rule = Callable[[Any, Any, int], "Known | None"]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "expand": _expand,
    "add": lambda args, kwargs, samples: _broadcast(args, kwargs, samples, multiply=False),
    "mul": lambda args, kwargs, samples: _broadcast(args, kwargs, samples, multiply=True),
}


def rule_for(func: Any) -> Rule | None:
    return _RULES.get(function_name(func))
