"""Per-sample gradients of every parameter from one backward pass.

While the network runs, a ``TorchFunctionMode`` sees each torch function that takes a parameter. For those it knows it
remembers the input and, when the backward pass reaches the output, forms the gradients of all samples with batched
products, a piece of the parameter at a time, and adds the piece's Gram matrix while the cache has it. A parameter used
several times gets the sum of its uses. Parameters that reach the features in any other way are found in the autograd
graph and differentiated sample by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..backends import notify_once
from ..errors import InputError
from ..memory import is_out_of_memory
from ..ops.patch_embed import patch_embed, patch_embed_reference
from ..ops.patch_merge import patch_merge, patch_merge_reference
from ..taylor.value import function_name
from .checkpointing import checkpoints_run_directly, saved_as_usual
from .contractions import Contraction, Known, gram_of_rows, named, rule_for
from .patch_merge import channels_last_features, patch_merge_channels_last

_MIXED = (-1,)  # numbers of one parameter in several orders
_REFERENCES: dict[Any, Callable[..., Tensor]] = {
    patch_embed: patch_embed_reference,
    patch_merge: patch_merge_reference,
}  # transparent, unlike the fused ops


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
    probe: Tensor | None = None,
    keep: bool = False,
    keeps_order: bool = False,
) -> RowSink:
    """Gradients of ``features(images)[j].sum()`` for every sample j and parameter; ``keep`` is that of ``RowSink``.

    ``features``: [B, 3, H, W] -> [B, F]. ``probe``: images, perhaps smaller ones, for which ``features`` calls the same
    functions; it is run on two or three of them, and where that fails, as the network has a batch size of its own, all
    parameters are differentiated sample by sample. None for networks whose layers are known to hold the samples one
    after the other. ``keeps_order``: no layer sees the batch in another order, which needs no check with a second
    backward pass of all images.
    """
    with torch.enable_grad(), checkpoints_run_directly():
        slow, rows = ({}, None) if probe is None else _probe(features, probe, parameters, len(images))
        while True:
            output, recorder = _record(features, images, parameters, slow, rows)
            if recorder.known and len(images) > 1 and not keeps_order:
                recorder.measure(output)
            sink = _collect(output, recorder, parameters, keep)
            if not recorder.mixing:
                return sink
            slow |= recorder.mixing


def _collect(output: Tensor, recorder: _Recorder, parameters: dict[str, nn.Parameter], keep: bool) -> RowSink:
    """The gradients of one recorded forward pass; right if ``recorder.mixing`` is still empty then."""
    sink = RowSink(keep)
    remaining = {name: parameters[name] for name in recorder.in_graph(output)}
    if recorder.known:
        recorder.sink = sink
        recorder.backward(output.sum(), retain_graph=bool(remaining))
        recorder.finish(sink)
    if remaining and not recorder.mixing:
        listed = ", ".join(f"{name} ({recorder.reason(name)})" for name in remaining)
        notify_once(("ntk", listed), f"asvit_fast: the NTK differentiates sample by sample (slower, exact): {listed}")
        _one_by_one(output, remaining, sink)
    return sink


def _record(
    features: Callable[[Tensor], Tensor],
    images: Tensor,
    parameters: dict[str, nn.Parameter],
    slow: dict[str, str],
    rows: dict[str, set[int]] | None,
) -> tuple[Tensor, _Recorder]:
    """One forward pass. ``slow``: parameters to leave in the graph -> why; those found on the way are added."""
    while True:
        recorder = _Recorder(parameters, len(images), slow, rows)
        with recorder:
            output = features(images)
        if not output.requires_grad:
            raise InputError(
                "the NTK needs gradients, and the features have none: does forward run under torch.no_grad(), "
                "or detach what it returns?"
            )
        conflicts = recorder.conflicts(output)
        if not conflicts:
            return output, recorder
        slow |= conflicts  # used both with and without a rule: all its uses go the slow way


def _one_by_one(output: Tensor, parameters: dict[str, nn.Parameter], sink: RowSink) -> None:
    """The exact path for anything differentiable: one backward pass per sample."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for sample in output:
        gradients = torch.autograd.grad(
            sample.sum(), list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            numbers = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            rows[name].append(numbers.flatten())
    for name, gradients_of_samples in rows.items():
        sink.add(name, [torch.stack(gradients_of_samples)])


# ------------------------------------------------------------------ which parameters keep samples apart


def _probe(
    features: Callable[[Tensor], Tensor], images: Tensor, parameters: dict[str, nn.Parameter], batch: int
) -> tuple[dict[str, str], dict[str, set[int]] | None]:
    """Parameters for the slow path -> why, and how many rows a sample has in the inputs of each of the others.

    A rule needs outputs that hold the samples one after the other, where the rows of a sample reach the features of
    that sample alone. Found by trying, with another number of samples than ``batch``, so that what does not grow with
    the batch shows: gradients of one sample's features must be zero in the rows of all others.
    """
    slow: dict[str, str] = {}
    if batch == 1:
        return slow, None
    samples = 3 if batch == 2 else 2
    images = images[torch.arange(samples, device=images.device) % len(images)]
    try:
        output, recorder = _record(features, images, parameters, slow, None)
    except (RuntimeError, AssertionError) as error:  # or other images fail as well, and say so
        if is_out_of_memory(error):
            raise
        return dict.fromkeys(parameters, f"the network does not take {samples} images"), None
    for sample in (0, samples - 1):
        recorder.probed = sample
        recorder.backward(output[sample].sum(), retain_graph=True)
    return slow | recorder.mixing, recorder.rows


# ------------------------------------------------------------------ the recorder


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass shows the gradient. ``anchor`` requires a gradient: the pass must come by."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, reached: Callable[[Tensor], None]) -> Tensor:
        ctx.reached = reached
        return out.detach()  # not a view to autograd: may be written to

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.reached(gradient)
        return gradient, None, None


class _Recorder(TorchFunctionMode):
    """Runs known functions on detached parameters, so that the backward pass computes gradients of activations only."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        samples: int,
        slow: dict[str, str],
        expected_rows: dict[str, set[int]] | None,
    ) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        # of scripted modules that were copied: torch makes them functions of the module's that was there first
        self.copied = {name: parameter for name, parameter in parameters.items() if not parameter.is_leaf}
        self.samples = samples
        self.slow = slow
        self.expected_rows = expected_rows  # of a sample in the inputs of known functions, by parameter
        self.rows: dict[str, set[int]] = defaultdict(set)  # those seen
        self.general: dict[str, str] = {}  # parameter -> a function without a rule that takes it
        self.differentiated: set[str] = set()  # parameters of functions that the network itself differentiates
        self.mixing: dict[str, str] = {}  # parameter -> a function whose rows of one sample reach another
        self.reshaped: dict[int, nn.Parameter] = {}  # other views of parameters, kept alive as their ids are names
        self.known: dict[str, int] = defaultdict(int)  # uses not yet seen by the backward pass
        self.several: set[str] = set()  # used more than once
        self.orders: dict[int, tuple[int, ...]] = {}  # of views with the numbers in another order, by id
        self.order_of: dict[str, tuple[int, ...] | None] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.pending: dict[str, Tensor] = {}
        self.sink: RowSink | None = None  # where gradients go
        self.weights: Tensor | None = None  # of the samples [B], while the backward pass is of their weighted sum
        self.norms: dict[int, Tensor] = {}  # of its gradients over the weights [B], float64, by call
        self.calls = 0  # of known functions
        self.probed: int | None = None  # or the sample whose features are differentiated by the probe
        self.replaying = False  # during a backward pass, for checkpoints that run their functions again

    def in_graph(self, output: Tensor) -> list[str]:
        """Parameters that reach ``output`` other than through a known function, in the order of the model."""
        leaves, nodes = _graph_of(output)
        copied = {name for name, parameter in self.copied.items() if parameter.grad_fn in nodes}
        return list(dict.fromkeys(name for i, name in self.names.items() if i in leaves or name in copied))

    def conflicts(self, output: Tensor) -> dict[str, str]:
        """Parameters that need the slow path but were detached somewhere -> why."""
        detached = {*self.known, *(self.names[i] for i in self.reshaped)}
        mixed = (name for name, order in self.order_of.items() if order == _MIXED)
        conflicting = [*self.in_graph(output), *mixed, *self.differentiated]
        return {name: self.reason(name) for name in conflicting if name in detached and name not in self.slow}

    def reason(self, name: str) -> str:
        return self.slow.get(name) or self.general.get(name) or "a function of its own"

    def measure(self, output: Tensor) -> None:
        """Takes the norms that the gradients of ``output.sum()`` have to have if each row is of the sample it is
        taken for: weights that differ from sample to sample must come back row by row, whatever the order."""
        exponents = (torch.arange(self.samples) - self.samples // 2) * min(1.0, 64 / self.samples)
        weights = (2**exponents).to(output)  # [B]; powers of 2, which change no rounding, of up to 64 samples
        self.weights = weights.double()
        weights = weights.reshape(-1, *[1] * (output.dim() - 1))
        self.backward((output * weights).sum(), retain_graph=True)
        self.weights = None

    def _check(self, call: int, function: str, names: Iterable[str], gradient: Tensor) -> None:
        """Compares the norms of a call's rows with those under weights."""
        norms = torch.linalg.vector_norm(gradient.reshape(self.samples, -1), dim=1, dtype=torch.float64)  # [B]
        if self.weights is not None:
            self.norms[call] = norms / self.weights
        elif ((norms - self.norms[call]).abs() > torch.finfo(gradient.dtype).eps ** 0.5 * norms).any():
            self.mixing |= dict.fromkeys(names, function)  # NaN, of a network that overflows, is no difference

    def backward(self, total: Tensor, retain_graph: bool) -> None:
        """Gradients of the scalar ``total`` pass by the outputs of known functions and end there."""
        self.replaying = True
        if self.known:
            with self:
                torch.autograd.backward(total, inputs=[self.anchor], retain_graph=retain_graph)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with saved_as_usual():
            parameters = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)]
            uses = [(self.names[id(p)], p) for p in parameters if id(p) in self.names]
            wanted = dict(uses)
            if self.replaying or not wanted or not torch.is_grad_enabled():
                return func(*args, **kwargs)
            if self.slow.keys().isdisjoint(wanted):
                if _reshapes_parameter(func, args):
                    return self._view(self.names[id(args[0])], func(*_detach(args), **kwargs))
                # of one parameter in two places, a rule would give the gradients of one
                known = self._known(func, args, kwargs, wanted) if len(uses) == len(wanted) else None
                if known is not None:
                    return self._run(func, args, kwargs, known, wanted)
            if func in _REFERENCES:
                return self._look_inside(func, args, kwargs)
            self.general |= dict.fromkeys(wanted, function_name(func))
            return func(*args, **kwargs)

    def _known(self, func: Any, args: Any, kwargs: Any, wanted: dict[str, nn.Parameter]) -> Known | None:
        """The result of the rule of ``func`` for this call, if there is one that serves all parameters of the call."""
        rule = rule_for(func)
        known = (
            None
            if rule is None or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))) or _beyond_rules((args, kwargs))
            else rule(args, kwargs, self.samples)
        )
        if known is None or not all(id(p) in known.contractions for p in wanted.values()):
            return None
        if self.expected_rows is not None and any(known.rows not in self.expected_rows[name] for name in wanted):
            return None
        return known

    def _view(self, name: str, numbers: Tensor, order: tuple[int, ...] | None = None) -> nn.Parameter:
        """The numbers of a parameter under another shape, or in another order."""
        view = nn.Parameter(numbers)
        self.reshaped[id(view)] = view
        self.names[id(view)] = name
        if order is not None:
            self.orders[id(view)] = order
        return view

    def _look_inside(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        implementation = _REFERENCES[func]
        names = ("x", "weight", "kernel", "stride", "norm_weight", "norm_bias", "bias")
        x, weight, kernel, stride, *norms, bias = named(args, kwargs, *names)
        if func is patch_merge and all(
            isinstance(p, nn.Parameter) and self.names.get(id(p)) not in self.slow for p in (weight, *norms)
        ):
            eps, order = named(args[7:], kwargs, "eps", "order")
            views = [self._channels_last(p, x.shape[3], order or "unfold") for p in (weight, *norms)]
            implementation = patch_merge_channels_last
            args, kwargs = (x, views[0], kernel, stride, *views[1:], bias, 1e-5 if eps is None else eps), {}
        with self:
            return implementation(*args, **kwargs)

    def _channels_last(self, parameter: nn.Parameter, channels: int, order: str) -> nn.Parameter:
        """The features of a neighbourhood channels last: the Gram matrix does not see the order."""
        numbers = channels_last_features(parameter.detach(), channels, order)
        name, key = self.names.get(id(parameter)), (channels, numbers.shape[-1], int(order == "timm"))
        return nn.Parameter(numbers) if name is None else self._view(name, numbers, key)

    def _run(self, func: Any, args: Any, kwargs: Any, known: Known, wanted: dict[str, nn.Parameter]) -> Tensor:
        out = func(*_detach(args), **_detach(kwargs)) if known.forward is None else known.forward()
        contractions = {name: known.contractions[id(parameter)] for name, parameter in wanted.items()}
        for name, parameter in wanted.items():
            self.rows[name].add(known.rows)
            self.known[name] += 1
            if self.known[name] > 1:
                self.several.add(name)
            order = self.orders.get(id(parameter))
            if self.order_of.setdefault(name, order) != order:  # such rows cannot be added
                self.order_of[name] = _MIXED
                self.general[name] = function_name(func)
        self.calls += 1
        operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not x.is_inference()]
        versions = [(x, x._version) for x in operands]
        reached = partial(self._reached, self.calls, function_name(func), contractions, versions)
        return _Tap.apply(out, self.anchor, reached)

    def _reached(
        self,
        call: int,
        function: str,
        contractions: dict[str, Contraction],
        versions: list[tuple[Tensor, int]],
        gradient: Tensor,
    ) -> None:
        if any(x._version != version for x, version in versions):
            raise RuntimeError(  # as autograd does
                f"the NTK needs an input of {function} that was modified by an inplace operation after it was used"
            )
        if not self.replaying:  # the network differentiates itself: of that gradient, no rule knows
            self.general |= dict.fromkeys(contractions, "a backward pass inside of forward")
            self.differentiated |= contractions.keys()
            return
        if self.weights is not None or call in self.norms:
            self._check(call, function, contractions, gradient)
        if self.probed is not None:
            of_samples = gradient.reshape(self.samples, -1)
            others = torch.cat([of_samples[: self.probed], of_samples[self.probed + 1 :]])
            if others.nan_to_num(nan=0.0).any():  # NaN: 0 times infinity, of a network that overflows
                self.mixing |= dict.fromkeys(contractions, function)
        if self.sink is None:
            return
        for name, contraction in contractions.items():
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

    def finish(self, sink: RowSink) -> None:
        """Hands over parameters some of whose uses do not reach the features; later backward passes are not seen."""
        for name, rows in self.pending.items():
            sink.add(name, [rows])
        self.pending.clear()
        self.norms.clear()
        self.sink = None


def _reshapes_parameter(func: Any, args: Any) -> bool:
    """The same numbers in the same order under another shape: gradients flatten alike."""
    return function_name(func) in ("reshape", "view", "flatten") and bool(args) and isinstance(args[0], nn.Parameter)


def _beyond_rules(values: Any) -> bool:
    """Complex tensors, whose gradients have conjugates, or empty ones, which have no rows to share out."""
    tensors = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
    return any(tensor.is_complex() or not tensor.numel() for tensor in tensors)


def _detach(values: Any) -> Any:
    return pytree.tree_map(lambda value: value.detach() if isinstance(value, nn.Parameter) else value, values)


def _graph_of(output: Tensor) -> tuple[set[int], set[Any]]:
    """Ids of the leaves of the autograd graph that ends in ``output``, and its nodes."""
    found, nodes, seen = set(), [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # of a leaf, the node that accumulates its gradient
            found.add(id(node.variable))
        nodes.extend(before for before, _ in node.next_functions)
    return found, seen
