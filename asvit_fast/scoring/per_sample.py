"""Per-sample gradients of every parameter from one backward pass.

While the network runs, a ``TorchFunctionMode`` sees each torch function that takes a parameter. For those it knows it
remembers the input and, when the backward pass reaches the output, forms the gradients of all samples with batched
products, a piece of the parameter at a time, and adds the piece's Gram matrix while the cache has it. A parameter used
several times gets the sum of its uses; one that meets a function without a rule is differentiated sample by sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..backends import notify_once
from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import (
    channels_last_features,
    patch_merge,
    patch_merge_channels_last,
    patch_merge_reference,
)
from ..taylor.value import function_name

_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    patch_embed: patch_embed_reference,
    patch_merge: patch_merge_reference,
}  # transparent, unlike the fused ops

PIECE = 2**21  # gradients to form at a time on a CPU: 8 MB of float32 stay in the last level of cache
SHORT = 2**16  # gradients to convert to float64 at a time: 512 KB stay in a core's own cache


class RowSink:
    """Takes the per-sample gradients of one parameter after the other, in pieces [B, n], adding their Gram matrix at
    once or keeping them in main memory."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.rows: dict[str, Tensor] = {}
        self._gram: Tensor | None = None

    def add(self, name: str, pieces: Iterable[Tensor]) -> None:
        if self.keep:
            self.rows[name] = torch.cat([rows.cpu() for rows in pieces], 1)
            return
        for rows in pieces:
            self.add_gram(gram_of_rows(rows))

    def add_gram(self, gram: Tensor) -> None:
        """gram [B, B], float64."""
        self._gram = gram if self._gram is None else self._gram.add_(gram)

    def gram(self, samples: int) -> Tensor:
        return torch.zeros(samples, samples, dtype=torch.float64) if self._gram is None else self._gram.cpu()


def gram_of_rows(rows: Tensor) -> Tensor:
    """rows [B, n] -> rows @ rows.T [B, B] in float64: sums in float32 would blur the small eigenvalues."""
    if rows.dtype == torch.float64 or rows.device.type != "cpu":
        rows = rows.double()
        return rows @ rows.T
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for short in rows.split(max(1, SHORT // len(rows)), 1):  # converted where the cache has it
        short = short.double()
        gram.addmm_(short, short.T)
    return gram


def per_sample_gradients(
    features: Callable[[Tensor], Tensor],
    images: Tensor,
    parameters: dict[str, nn.Parameter],
    sink: RowSink,
    probe: Tensor | None = None,
) -> None:
    """Gradients of ``features(images)[j].sum()`` for every sample j and parameter, handed to ``sink``.

    ``features``: [B, 3, H, W] -> [B, F]. ``probe``: images, perhaps smaller ones, for which ``features`` calls the same
    functions in the same order; it is run on two of them twice.
    """
    sample_major = _sample_major_calls(features, images if probe is None else probe)
    general: dict[str, str] = {}  # parameters for the slow path -> the function that has no rule
    while True:
        recorder = _Recorder(parameters, len(images), sample_major, general)
        with torch.enable_grad(), recorder:
            output = features(images)
        if not recorder.conflicts:
            break
        general |= recorder.conflicts  # used both with and without a rule: all its uses go the slow way
    slow = {name: parameters[name] for name in recorder.general}
    if slow:
        listed = ", ".join(f"{name} ({recorder.general[name]})" for name in slow)
        notify_once(("ntk", listed), f"asvit_fast: the NTK differentiates sample by sample (slower, exact): {listed}")
        _one_by_one(output, slow, sink)
    if recorder.leaves:
        recorder.sink = sink
        torch.autograd.backward(output.sum(), inputs=recorder.leaves)
        recorder.flush(sink)


def _one_by_one(output: Tensor, parameters: dict[str, nn.Parameter], sink: RowSink) -> None:
    """The exact path for anything differentiable: one backward pass per sample."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for sample in output:
        gradients = torch.autograd.grad(
            sample.sum(), list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            rows[name].append(gradient.flatten())
    for name, gradients_of_samples in rows.items():
        sink.add(name, [torch.stack(gradients_of_samples)])


# ------------------------------------------------------------------ which calls keep samples apart


class _Inputs(TorchFunctionMode):
    """Collects the first tensor argument of every call that involves a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reshapes_parameter(func, args):
            return nn.Parameter(func(*_detach(args), **kwargs))
        known = _rule_for(func) is not None or func in _REFERENCES
        if known and any(isinstance(leaf, nn.Parameter) for leaf in _leaves(args, kwargs)):
            tensors = (a for a in _leaves(args, kwargs) if isinstance(a, Tensor) and not isinstance(a, nn.Parameter))
            self.seen.append(next(tensors, torch.empty(0)))
        return func(*args, **kwargs)


def _sample_major_calls(features: Callable[[Tensor], Tensor], images: Tensor) -> list[bool]:
    """For each call with a parameter, in order: whether its input holds the samples one after the other.

    Found by trying: of two samples the first is exchanged, and then the first half of the input may change and the
    second may not.
    """
    pair = torch.stack([images[0], images[-1]]) if len(images) > 1 else images[[0, 0]]
    inputs = []
    for first in (pair[0], pair[0].flip(-1) + 1):
        recorder = _Inputs()
        with torch.no_grad(), recorder:
            features(torch.stack([first, pair[1]]))
        inputs.append(recorder.seen)

    def second_half(x: Tensor) -> Tensor:
        return x[x.shape[0] // 2 :]

    return [
        a.shape == b.shape and a.dim() > 1 and a.shape[0] % 2 == 0 and torch.equal(second_half(a), second_half(b))
        for a, b in zip(*inputs, strict=True)
    ]


# ------------------------------------------------------------------ the recorder


class _Recorder(TorchFunctionMode):
    """Runs known functions on detached parameters, so that the backward pass computes gradients of activations only."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], samples: int, sample_major: list[bool], forced: dict[str, str]
    ) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.samples = samples
        self.sample_major = iter(sample_major)
        self.inside: bool | None = None  # inside an op's reference: whether the op keeps samples apart
        self.forced = forced
        self.general: dict[str, str] = {}
        self.reshaped: dict[int, nn.Parameter] = {}  # other views of parameters, kept alive as their ids are names
        self.known: dict[str, int] = defaultdict(int)  # uses not yet seen by the backward pass
        self.several: set[str] = set()  # used more than once
        self.orders: dict[int, tuple[int, ...]] = {}  # of views with the numbers in another order, by id
        self.order_of: dict[str, tuple[int, ...] | None] = {}
        self.leaves: list[Tensor] = []
        self.pending: dict[str, Tensor] = {}
        self.sink: RowSink | None = None  # None: backward passes go by unrecorded

    @property
    def conflicts(self) -> dict[str, str]:
        """Parameters that need the slow path but were detached somewhere."""
        detached = {*self.known, *(self.names[i] for i in self.reshaped)}
        return {name: func for name, func in self.general.items() if name in detached and name not in self.forced}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parameters = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, nn.Parameter)]
        if not parameters or function_name(func) in _QUESTIONS:
            return func(*args, **kwargs)
        name = self.names.get(id(args[0])) if _reshapes_parameter(func, args) else None
        if name is not None and name not in self.forced:
            return self._view(name, func(*_detach(args), **kwargs))
        rule = _rule_for(func)
        keeps_samples_apart = self._keeps_samples_apart() if rule is not None or func in _REFERENCES else False
        wanted = {self.names[id(p)]: p for p in parameters if id(p) in self.names}
        forced = any(name in self.forced for name in wanted)
        known = rule(args, kwargs, self.samples) if rule is not None and keeps_samples_apart and not forced else None
        if known is None and func in _REFERENCES:
            return self._look_inside(func, args, kwargs, keeps_samples_apart, forced)
        if known is None:
            self.general |= dict.fromkeys(wanted, function_name(func))
            return func(*_detach(args, keep=wanted), **_detach(kwargs, keep=wanted))
        return self._run(func, args, kwargs, known, wanted)

    def _keeps_samples_apart(self) -> bool:
        return next(self.sample_major, False) if self.inside is None else self.inside

    def _view(self, name: str, numbers: Tensor, order: tuple[int, ...] | None = None) -> nn.Parameter:
        """The numbers of a parameter under another shape, or in another order."""
        view = nn.Parameter(numbers)
        self.reshaped[id(view)] = view
        self.names[id(view)] = name
        if order is not None:
            self.orders[id(view)] = order
        return view

    def _look_inside(self, func: Any, args: Any, kwargs: Any, keeps_samples_apart: bool, forced: bool) -> Tensor:
        implementation = _REFERENCES[func]
        names = ("x", "weight", "kernel", "stride", "norm_weight", "norm_bias", "bias")
        x, weight, kernel, stride, *norms, bias = _named(args, kwargs, *names)
        if func is patch_merge and not forced and all(isinstance(p, nn.Parameter) for p in (weight, *norms)):
            views = [self._channels_last(p, x.shape[3]) for p in (weight, *norms)]
            implementation = patch_merge_channels_last
            args, kwargs = (x, views[0], kernel, stride, *views[1:], bias, *args[7:]), _without(kwargs, names)
        self.inside = keeps_samples_apart
        try:
            with self:
                return implementation(*args, **kwargs)
        finally:
            self.inside = None

    def _channels_last(self, parameter: nn.Parameter, channels: int) -> nn.Parameter:
        """The features of a neighbourhood channels last: the Gram matrix does not see the order."""
        numbers = channels_last_features(parameter.detach(), channels)
        name = self.names.get(id(parameter))
        return nn.Parameter(numbers) if name is None else self._view(name, numbers, (channels, numbers.shape[-1]))

    def _run(self, func: Any, args: Any, kwargs: Any, known: Known, wanted: dict[str, nn.Parameter]) -> Tensor:
        needed = {name: known.contractions[id(p)] for name, p in wanted.items() if id(p) in known.contractions}
        unknown = set(wanted) - set(needed)
        self.general |= dict.fromkeys(unknown, function_name(func))
        if unknown and not needed:
            return func(*_detach(args, keep=wanted), **_detach(kwargs, keep=wanted))
        out = func(*_detach(args), **_detach(kwargs)) if known.forward is None else known.forward()
        if not needed:
            return out
        if not out.requires_grad:
            out = out.requires_grad_()
            self.leaves.append(out)
        for name, parameter in wanted.items():
            if name not in needed:
                continue
            self.known[name] += 1
            if self.known[name] > 1:
                self.several.add(name)
            order = self.orders.get(id(parameter))
            if self.order_of.setdefault(name, order) != order:  # such rows cannot be added
                self.general[name] = function_name(func)
        out.register_hook(lambda gradient: self._reached(gradient, needed))
        return out.view_as(out)

    def _reached(self, gradient: Tensor, needed: dict[str, Contraction]) -> None:
        if self.sink is None:
            return
        for name, contraction in needed.items():
            self.known[name] -= 1
            if name in self.several:
                rows = torch.cat(list(contraction.rows(gradient)), 1)
                self.pending[name] = self.pending[name].add_(rows) if name in self.pending else rows
                if self.known[name] == 0:
                    self.sink.add(name, [self.pending.pop(name)])
            elif contraction.gram is not None and not self.sink.keep:
                self.sink.add_gram(contraction.gram(gradient))
            else:
                self.sink.add(name, contraction.rows(gradient))

    def flush(self, sink: RowSink) -> None:
        """Parameters some of whose uses do not reach the features."""
        for name, rows in self.pending.items():
            sink.add(name, [rows])
        self.pending.clear()


def _reshapes_parameter(func: Any, args: Any) -> bool:
    """The same numbers in the same order under another shape: gradients flatten alike."""
    return function_name(func) in ("reshape", "view", "flatten") and bool(args) and isinstance(args[0], nn.Parameter)


def _without(kwargs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _leaves(args: Any, kwargs: Any) -> Iterable[Any]:
    return pytree.tree_leaves((args, kwargs))


def _detach(values: Any, keep: dict[str, nn.Parameter] | None = None) -> Any:
    kept = {id(p) for p in (keep or {}).values()}

    def one(value: Any) -> Any:
        return value.detach() if isinstance(value, nn.Parameter) and id(value) not in kept else value

    return pytree.tree_map(one, values)


# ------------------------------------------------------------------ rules: (args, kwargs, B) -> what is known of a call


@dataclass(frozen=True)
class Contraction:
    """From the gradient of a call's output to those of one parameter."""

    rows: Callable[[Tensor], Iterable[Tensor]]  # gradient rows [B, parameter] in pieces [B, n], from left to right
    gram: Callable[[Tensor], Tensor] | None = None  # their Gram matrix [B, B], float64, where that is cheaper


@dataclass(frozen=True)
class Known:
    contractions: dict[int, Contraction]  # by parameter id
    forward: Callable[[], Tensor] | None = None  # to run instead of the function


_QUESTIONS = {
    "shape",
    "size",
    "dim",
    "ndim",
    "dtype",
    "device",
    "numel",
    "requires_grad",
    "is_floating_point",
    "get_device",
    "is_cuda",
}


def _named(args: Any, kwargs: Any, *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _contractions(*pairs: tuple[Any, Callable[[Tensor], Tensor]]) -> dict[int, Contraction]:
    """Of parameters small enough for rows [B, parameter] in one piece."""

    def one_piece(rows: Callable[[Tensor], Tensor]) -> Contraction:
        return Contraction(lambda gradient: [rows(gradient)])

    return {id(parameter): one_piece(rows) for parameter, rows in pairs if isinstance(parameter, nn.Parameter)}


def _parts(outputs: int, inputs: int, like: Tensor, samples: int) -> Iterable[slice]:
    """Cuts a weight [outputs, inputs] so that the gradient rows of a part are PIECE numbers on a CPU."""
    step = max(1, PIECE // (samples * inputs)) if like.device.type == "cpu" else outputs
    return (slice(start, start + step) for start in range(0, outputs, step))


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
            return sum((gram_of_rows(piece) for piece in rows(gradient)), g.new_zeros((), dtype=torch.float64))
        pairs_of_x, pairs_of_g = (a @ a.T for a in (x.flatten(0, 1).double(), g.flatten(0, 1).double()))  # [B*T, B*T]
        return (pairs_of_x * pairs_of_g).reshape(samples, tokens, samples, tokens).sum((1, 3))

    return Contraction(rows, gram)


def _linear(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    if x.shape[0] % samples:
        return None
    known = _contractions((bias, lambda gradient: gradient.reshape(samples, -1, gradient.shape[-1]).sum(1)))
    if isinstance(weight, nn.Parameter):
        known[id(weight)] = _linear_weight(x, samples)
    return Known(known)


def _conv2d(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, weight, bias, stride, padding, dilation, groups = _named(
        args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if x.shape[0] != samples or isinstance(padding, str):
        return None
    x, shape, groups = x.detach(), tuple(weight.shape), groups or 1

    def rows(gradient: Tensor) -> Iterable[Tensor]:
        """Sample by sample and, without groups, some output channels at a time."""
        inputs = math.prod(shape[1:])
        parts = _parts(shape[0], inputs, x, samples) if groups == 1 else [slice(0, shape[0])]
        for part in parts:
            g = gradient[:, part]  # [B, part, Ho, Wo]
            weights = (g.shape[1], *shape[1:])
            yield torch.stack(
                [
                    conv2d_weight(
                        x[j : j + 1], weights, g[j : j + 1], stride or 1, padding or 0, dilation or 1, groups
                    ).flatten()
                    for j in range(samples)
                ]
            )

    known = _contractions((bias, lambda gradient: gradient.sum((2, 3))))
    if isinstance(weight, nn.Parameter):
        known[id(weight)] = Contraction(rows)
    return Known(known)


def _layer_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, shape, weight, bias, eps = _named(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    if x.shape[0] % samples:
        return None
    statistics: list[Tensor] = []  # mean and 1 / standard deviation, [B*n, ..., 1]

    def forward() -> Tensor:
        out, *rest = torch.native_layer_norm(x, shape, _detach(weight), _detach(bias), 1e-5 if eps is None else eps)
        statistics[:] = rest
        return out

    def of_samples(gradient: Tensor, output: int) -> Tensor:
        """Gradients [B, parameter] of the weight (output 1) or the bias (2)."""
        mask = [False, output == 1, output == 2]
        of_sample = zip(*(t.detach().chunk(samples) for t in (gradient, x, *statistics)), strict=True)
        gradients = [
            torch.ops.aten.native_layer_norm_backward(g, x, shape, mean, rstd, *_detach((weight, bias)), mask)[output]
            for g, x, mean, rstd in of_sample
        ]
        return torch.stack(gradients).flatten(1)

    known = _contractions((weight, lambda gradient: of_samples(gradient, 1)), (bias, lambda g: of_samples(g, 2)))
    return Known(known, forward)


def _batch_norm(args: Any, kwargs: Any, samples: int) -> Known | None:
    x, mean, var, weight, bias, training, _, eps = _named(
        args, kwargs, "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    )
    if training or mean is None or x.shape[0] != samples:
        return None
    x, eps = x.detach(), 1e-5 if eps is None else eps

    def to_weight(gradient: Tensor) -> Tensor:
        normalised = F.batch_norm(x, mean, var, eps=eps)
        return (gradient * normalised).flatten(2).sum(2) if x.dim() > 2 else gradient * normalised

    def to_bias(gradient: Tensor) -> Tensor:
        return gradient.flatten(2).sum(2) if x.dim() > 2 else gradient

    return Known(_contractions((weight, to_weight), (bias, to_bias)))


def _broadcast(args: Any, kwargs: Any, samples: int, multiply: bool) -> Known | None:
    """x + p or x * p with p the same for every sample (a position embedding, a layer scale)."""
    if len(args) < 2 or kwargs or not all(isinstance(a, Tensor) for a in args[:2]):
        return None
    x, parameter = args[:2] if isinstance(args[1], nn.Parameter) else (args[1], args[0])
    same_for_all = parameter.dim() < x.dim() or (parameter.dim() == x.dim() and parameter.shape[0] == 1)
    if isinstance(x, nn.Parameter) or x.shape[0] % samples or not same_for_all:
        return None
    x, shape = x.detach(), parameter.shape

    def to_parameter(gradient: Tensor) -> Tensor:
        gradient = gradient * x if multiply else gradient
        per_sample = gradient.reshape(samples, -1, *gradient.shape[1:])
        return torch.stack([g.sum_to_size(shape).flatten() for g in per_sample])

    return Known(_contractions((parameter, to_parameter)))


Rule = Callable[[Any, Any, int], "Known | None"]
_RULES: dict[str, Rule] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "add": lambda args, kwargs, samples: _broadcast(args, kwargs, samples, multiply=False),
    "mul": lambda args, kwargs, samples: _broadcast(args, kwargs, samples, multiply=True),
}


def _rule_for(func: Any) -> Rule | None:
    return _RULES.get(function_name(func))
