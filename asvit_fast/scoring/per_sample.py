"""Per-sample gradients of every parameter from one backward pass.

While the network runs, a ``TorchFunctionMode`` sees each torch function that takes a parameter. For those it knows it
remembers the input and, when the backward pass reaches the output, forms the gradients of all samples with one batched
product. A parameter used several times gets the sum of its uses; one that meets a function without a rule is
differentiated sample by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..backends import notify_once
from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..taylor.value import function_name

_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    patch_embed: patch_embed_reference,
    patch_merge: patch_merge_reference,
}  # transparent, unlike the fused ops

# (gradient of the output [B, ...], sample count) -> gradient rows [B, parameter], per parameter position of the call
Contraction = Callable[[Tensor, int], Tensor]


class RowSink:
    """Takes the per-sample gradients [B, parameter] of one parameter after the other, adding their Gram matrix at once
    (products in the gradients' precision over short pieces, sums in float64) or keeping them in main memory."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.rows: dict[str, Tensor] = {}
        self._gram: Tensor | None = None

    def add(self, name: str, rows: Tensor) -> None:
        if self.keep:
            self.rows[name] = rows.cpu()
            return
        if rows.dtype != torch.float64:
            rows = rows.double()
        gram = rows @ rows.T
        self._gram = gram if self._gram is None else self._gram + gram

    def gram(self, samples: int) -> Tensor:
        return torch.zeros(samples, samples, dtype=torch.float64) if self._gram is None else self._gram.cpu()


def per_sample_gradients(
    features: Callable[[Tensor], Tensor], images: Tensor, parameters: dict[str, nn.Parameter], sink: RowSink
) -> None:
    """Gradients of ``features(images)[j].sum()`` for every sample j and parameter, handed to ``sink``.

    ``features``: [B, 3, H, W] -> [B, F].
    """
    sample_major = _sample_major_calls(features, images)
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
        recorder.on_rows = sink.add
        torch.autograd.backward(output.sum(), inputs=recorder.leaves)
        recorder.flush()


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
        sink.add(name, torch.stack(gradients_of_samples))


# ------------------------------------------------------------------ which calls keep samples apart


class _Inputs(TorchFunctionMode):
    """Collects the first tensor argument of every call that involves a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFERENCES:
            with self:
                return _REFERENCES[func](*args, **kwargs)
        if _reshapes_parameter(func, args):
            return nn.Parameter(func(*_detach(args), **kwargs))
        if _rule_for(func) is not None and any(isinstance(leaf, nn.Parameter) for leaf in _leaves(args, kwargs)):
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
        self.forced = forced
        self.general: dict[str, str] = {}
        self.reshaped: dict[int, nn.Parameter] = {}  # other views of parameters, kept alive as their ids are names
        self.known: dict[str, int] = defaultdict(int)  # uses not yet seen by the backward pass
        self.leaves: list[Tensor] = []
        self.pending: dict[str, Tensor] = {}
        self.on_rows: Callable[[str, Tensor], None] | None = None  # None: backward passes go by unrecorded

    @property
    def conflicts(self) -> dict[str, str]:
        """Parameters that need the slow path but were detached somewhere."""
        detached = {*self.known, *(self.names[i] for i in self.reshaped)}
        return {name: func for name, func in self.general.items() if name in detached and name not in self.forced}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _REFERENCES:
            with self:
                return _REFERENCES[func](*args, **kwargs)
        parameters = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, nn.Parameter)]
        if not parameters or function_name(func) in _QUESTIONS:
            return func(*args, **kwargs)
        name = self.names.get(id(args[0])) if _reshapes_parameter(func, args) else None
        if name is not None and name not in self.forced:
            view = nn.Parameter(func(*_detach(args), **kwargs))
            self.reshaped[id(view)] = view
            self.names[id(view)] = name
            return view
        rule = _rule_for(func)
        keeps_samples_apart = rule is not None and next(self.sample_major, False)
        wanted = {self.names[id(p)]: p for p in parameters if id(p) in self.names}
        contractions = rule(args, kwargs, self.samples) if rule is not None and keeps_samples_apart else None
        if contractions is None or any(name in self.forced for name in wanted):
            self.general |= dict.fromkeys(wanted, function_name(func))
            return func(*_detach(args, keep=wanted), **_detach(kwargs, keep=wanted))
        return self._run(func, args, kwargs, contractions, wanted)

    def _run(
        self, func: Any, args: Any, kwargs: Any, contractions: dict[int, Contraction], wanted: dict[str, nn.Parameter]
    ) -> Tensor:
        out = func(*_detach(args), **_detach(kwargs))
        needed = {name: contractions[id(p)] for name, p in wanted.items() if id(p) in contractions}
        unknown = set(wanted) - set(needed)
        self.general |= dict.fromkeys(unknown, function_name(func))
        if not needed:
            return out if not unknown else func(*_detach(args, keep=wanted), **_detach(kwargs, keep=wanted))
        if not out.requires_grad:
            out = out.requires_grad_()
            self.leaves.append(out)
        for name in needed:
            self.known[name] += 1
        out.register_hook(lambda gradient: self._reached(gradient, needed))
        return out.view_as(out)

    def _reached(self, gradient: Tensor, needed: dict[str, Contraction]) -> None:
        if self.on_rows is None:
            return
        for name, contract in needed.items():
            rows = contract(gradient, self.samples)
            self.pending[name] = self.pending[name] + rows if name in self.pending else rows
            self.known[name] -= 1
            if self.known[name] == 0:
                self.on_rows(name, self.pending.pop(name))

    def flush(self) -> None:
        """Parameters some of whose uses do not reach the features."""
        assert self.on_rows is not None
        for name, rows in self.pending.items():
            self.on_rows(name, rows)
        self.pending.clear()


def _reshapes_parameter(func: Any, args: Any) -> bool:
    """The same numbers in the same order under another shape: gradients flatten alike."""
    return function_name(func) in ("reshape", "view", "flatten") and bool(args) and isinstance(args[0], nn.Parameter)


def _leaves(args: Any, kwargs: Any) -> Iterable[Any]:
    return pytree.tree_leaves((args, kwargs))


def _detach(values: Any, keep: dict[str, nn.Parameter] | None = None) -> Any:
    kept = {id(p) for p in (keep or {}).values()}

    def one(value: Any) -> Any:
        return value.detach() if isinstance(value, nn.Parameter) and id(value) not in kept else value

    return pytree.tree_map(one, values)


# ------------------------------------------------------------------ rules: (args, kwargs, B) -> contraction by
# parameter id

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


def _rows(values: Tensor, samples: int) -> Tensor:
    """[B*n, ...] -> [B, ...flattened]."""
    return values.reshape(samples, -1)


def _contractions(*pairs: tuple[Any, Contraction]) -> dict[int, Contraction]:
    return {id(parameter): contract for parameter, contract in pairs if isinstance(parameter, nn.Parameter)}


def _linear(args: Any, kwargs: Any, samples: int) -> dict[int, Contraction] | None:
    x, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    if x.shape[0] % samples:
        return None
    x = x.detach()

    def to_weight(gradient: Tensor, samples: int) -> Tensor:
        g = gradient.reshape(samples, -1, gradient.shape[-1])  # [B, T, out]
        return _rows(torch.bmm(g.transpose(1, 2), x.reshape(samples, -1, x.shape[-1])), samples)

    def to_bias(gradient: Tensor, samples: int) -> Tensor:
        return gradient.reshape(samples, -1, gradient.shape[-1]).sum(1)

    return _contractions((weight, to_weight), (bias, to_bias))


def _conv2d(args: Any, kwargs: Any, samples: int) -> dict[int, Contraction] | None:
    x, weight, bias, stride, padding, dilation, groups = _named(
        args, kwargs, "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    if x.shape[0] != samples or isinstance(padding, str):
        return None
    x, groups, kernel = x.detach(), groups or 1, tuple(weight.shape[2:])

    def to_weight(gradient: Tensor, samples: int) -> Tensor:
        patches = F.unfold(x, kernel, dilation or 1, padding or 0, stride or 1)  # [B, Cin*K*K, L]
        patches = patches.reshape(samples * groups, -1, patches.shape[-1])  # [B*groups, Cin/groups*K*K, L]
        g = gradient.reshape(samples * groups, -1, patches.shape[-1])  # [B*groups, Cout/groups, L]
        return _rows(torch.bmm(g, patches.transpose(1, 2)), samples)

    return _contractions((weight, to_weight), (bias, lambda gradient, samples: gradient.sum((2, 3))))


def _layer_norm(args: Any, kwargs: Any, samples: int) -> dict[int, Contraction] | None:
    x, shape, weight, bias, eps = _named(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    if x.shape[0] % samples:
        return None
    x, size, eps = x.detach(), weight.numel() if weight is not None else 0, 1e-5 if eps is None else eps

    def to_weight(gradient: Tensor, samples: int) -> Tensor:
        return (gradient * F.layer_norm(x, shape, eps=eps)).reshape(samples, -1, size).sum(1)

    return _contractions(
        (weight, to_weight), (bias, lambda gradient, samples: gradient.reshape(samples, -1, size).sum(1))
    )


def _batch_norm(args: Any, kwargs: Any, samples: int) -> dict[int, Contraction] | None:
    x, mean, var, weight, bias, training, _, eps = _named(
        args, kwargs, "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    )
    if training or mean is None or x.shape[0] != samples:
        return None
    x, eps = x.detach(), 1e-5 if eps is None else eps

    def to_weight(gradient: Tensor, samples: int) -> Tensor:
        normalised = F.batch_norm(x, mean, var, eps=eps)
        return (gradient * normalised).flatten(2).sum(2) if x.dim() > 2 else gradient * normalised

    return _contractions(
        (weight, to_weight), (bias, lambda gradient, samples: gradient.flatten(2).sum(2) if x.dim() > 2 else gradient)
    )


def _broadcast(args: Any, kwargs: Any, samples: int, multiply: bool) -> dict[int, Contraction] | None:
    """x + p or x * p with p the same for every sample (a position embedding, a layer scale)."""
    if len(args) < 2 or kwargs or not all(isinstance(a, Tensor) for a in args[:2]):
        return None
    x, parameter = args[:2] if isinstance(args[1], nn.Parameter) else (args[1], args[0])
    same_for_all = parameter.dim() < x.dim() or (parameter.dim() == x.dim() and parameter.shape[0] == 1)
    if isinstance(x, nn.Parameter) or x.shape[0] % samples or not same_for_all:
        return None
    x, shape = x.detach(), parameter.shape

    def contract(gradient: Tensor, samples: int) -> Tensor:
        gradient = gradient * x if multiply else gradient
        per_sample = gradient.reshape(samples, -1, *gradient.shape[1:])
        return torch.stack([_rows(g.sum_to_size(shape), 1)[0] for g in per_sample])

    return _contractions((parameter, contract))


Rule = Callable[[Any, Any, int], "dict[int, Contraction] | None"]
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
