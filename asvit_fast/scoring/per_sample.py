"""Per-sample gradients of every parameter from one backward pass.

While the network runs, a ``TorchFunctionMode`` sees each torch function that takes a parameter. For those it knows it
remembers the input and, when the backward pass reaches the output, forms the gradients of all samples with batched
products, a piece of the parameter at a time, and adds the piece's Gram matrix while the cache has it. A parameter used
several times gets the sum of its uses; one that meets a function without a rule is differentiated sample by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..backends import notify_once
from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..taylor.value import function_name
from .contractions import Contraction, Known, gram_of_rows, named, rule_for
from .patch_merge import channels_last_features, patch_merge_channels_last

_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    patch_embed: patch_embed_reference,
    patch_merge: patch_merge_reference,
}  # transparent, unlike the fused ops
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
        known = rule_for(func) is not None or func in _REFERENCES
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
        rule = rule_for(func)
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
        x, weight, kernel, stride, *norms, bias = named(args, kwargs, *names)
        if func is patch_merge and not forced and all(isinstance(p, nn.Parameter) for p in (weight, *norms)):
            eps, order = named(args[7:], kwargs, "eps", "order")
            views = [self._channels_last(p, x.shape[3], order or "unfold") for p in (weight, *norms)]
            implementation = patch_merge_channels_last
            args, kwargs = (x, views[0], kernel, stride, *views[1:], bias, 1e-5 if eps is None else eps), {}
        self.inside = keeps_samples_apart
        try:
            with self:
                return implementation(*args, **kwargs)
        finally:
            self.inside = None

    def _channels_last(self, parameter: nn.Parameter, channels: int, order: str) -> nn.Parameter:
        """The features of a neighbourhood channels last: the Gram matrix does not see the order."""
        numbers = channels_last_features(parameter.detach(), channels, order)
        name, key = self.names.get(id(parameter)), (channels, numbers.shape[-1], int(order == "timm"))
        return nn.Parameter(numbers) if name is None else self._view(name, numbers, key)

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


def _leaves(args: Any, kwargs: Any) -> Iterable[Any]:
    return pytree.tree_leaves((args, kwargs))


def _detach(values: Any, keep: dict[str, nn.Parameter] | None = None) -> Any:
    kept = {id(p) for p in (keep or {}).values()}

    def one(value: Any) -> Any:
        return value.detach() if isinstance(value, nn.Parameter) and id(value) not in kept else value

    return pytree.tree_map(one, values)
