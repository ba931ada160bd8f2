"""Does an accelerated model still compute what it did? Outputs and gradients on the user's own data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..errors import InputError
from ..modes import without_dropout
from ..ops.transforms import autocast_active
from .swap import accelerate, restore

COARSE = 1e-4  # relative errors that numbers of 16 bits have
SLACK = 2.0  # how many times the source's own error is still rounding


@dataclass(frozen=True)
class Difference:
    """One tensor: an output, or the gradient of a parameter or an input."""

    mode: str  # "eval" or "train"
    name: str
    difference: float  # largest absolute difference of the accelerated and the restored model
    size: float  # largest absolute value in the reference
    error: float  # largest absolute error of the accelerated model against the reference
    source_error: float  # that of the restored model
    rounding: bool  # whether the error is of the size of rounding errors
    comparable: bool = True  # False if the reference has numbers that are not finite, whose error nobody can tell


@dataclass(frozen=True)
class Verification:
    """The result of ``verify``: the largest differences first, relative to the size of the tensor."""

    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether something was compared and all differences are rounding."""
        return len(self.differences) > 0 and all(difference.rounding for difference in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, "differences": [asdict(difference) for difference in self.differences]}

    def table(self, rows: int = 10) -> str:
        """The first `rows` differences, all that are more than rounding, and a verdict."""
        shown = [d for i, d in enumerate(self.differences) if i < rows or not d.rounding]
        width = max((len(d.name) for d in shown), default=0)
        lines = [
            f"{d.mode:<5}  {d.name:<{width}}  difference {d.difference:.1e} of {d.size:.1e}, error {d.error:.1e} "
            f"(as its package does it: {d.source_error:.1e}){_remark(d)}"
            if d.comparable
            else f"{d.mode:<5}  {d.name:<{width}}{_remark(d)}"
            for d in shown
        ]
        return "\n".join([*lines, f"{sum(d.comparable for d in self.differences)} tensors compared: {self._verdict()}"])

    def _verdict(self) -> str:
        if self.ok:
            return "all differences are rounding"
        unknown = sum(not d.comparable for d in self.differences)
        wrong = sum(not d.rounding for d in self.differences) - unknown
        why = "the model gives NaN or infinity as its package does it, too"
        if unknown == len(self.differences):
            return f"nothing could be compared: {why}"
        parts = [f"{wrong} of them differ by more than rounding"] if wrong else []
        if unknown:
            parts.append(f"{unknown} could not be compared: {why}")
        return "; ".join(parts)

    def __str__(self) -> str:
        return self.table()


def _remark(difference: Difference) -> str:
    if not difference.comparable:
        return "  NOT FINITE"
    return "" if difference.rounding else "  MORE THAN ROUNDING"


def verify(
    model: nn.Module,
    sample: Any,
    *,
    modes: str | Sequence[str] = ("eval", "train"),
    gradients: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
    reference: torch.dtype | None = torch.float64,
    seed: int = 0,
    rows: int = 10,
) -> Verification:
    """Compare a model with and without ``accelerate`` on your own data: outputs and gradients, with the same random
    numbers.

    Works on copies, one at a time: the model, accelerated already or not, stays as it is. Both copies are held against
    a third one in higher precision, so that a difference can be told from rounding: an error counts as rounding up to
    twice that of the restored model on the same tensor, or what the last digit of the sample changes there, or on the
    worst tenth of tensors where that is larger.
    Dropout (not stochastic depth) is off, as its masks may differ by precision. Prints the largest differences.
    Inside ``torch.autocast`` it compares what autocast makes of both.

    Args:
        model: a model.
        sample: what it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        modes: "eval", "train" or a sequence of both.
        gradients: also compare the gradients of all parameters and floating point inputs.
        loss: scalar function of the output to differentiate; by default a fixed random linear one of all its tensors.
        reference: precision of the third copy; None: compare the two only, with errors relative to the restored one.
        seed: of the random numbers in training mode.
        rows: how many differences to print; 0 prints nothing.

    Returns:
        Everything that was compared; ``ok`` says whether all of it is rounding, which it is not where the numbers are
        not finite.

    Raises:
        InputError: a model that cannot be copied, a sample or an output without tensors, no scalar to differentiate, no
            or an unknown mode.

    Examples:
        >>> import timm, torch, asvit_fast as af
        >>> model = timm.create_model("test_vit")
        >>> af.verify(model, torch.randn(1, 3, 160, 160), modes="eval", rows=0).ok
        True
    """
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or not set(modes) <= {"eval", "train"}:
        raise InputError(f"verify: modes are 'eval' and 'train', got {list(modes)}")
    if next(named_tensors("input", sample), None) is None:
        raise InputError(
            "verify: sample must be a tensor, a tuple of arguments or a dict of keyword arguments with tensors, "
            f"got {type(sample).__name__}"
        )
    differences: list[Difference] = []
    for mode in modes:
        fast, source = (
            _run(_prepared(model, mode, fast, None), _converted(sample, None), gradients, loss, seed)
            for fast in (True, False)
        )
        nudged = _run(_prepared(model, mode, False, None), _nudged(sample), gradients, loss, seed)
        exact = source
        if reference is not None:
            wide = _prepared(model, mode, False, reference)
            with use_backend("reference"):  # of networks that are made of our ops
                exact = _run(wide, _converted(sample, reference), gradients, loss, seed)
        differences += _compare(mode, fast, source, nudged, exact)
    differences.sort(key=lambda d: (d.rounding, -d.difference / max(d.size, 1e-30)))
    result = Verification(tuple(differences))
    if rows > 0:
        print(result.table(rows))
    return result


def _prepared(model: nn.Module, mode: str, fast: bool, dtype: torch.dtype | None) -> nn.Module:
    """A copy to run: accelerated or restored, in `dtype`, without dropout."""
    try:
        copied = restore(copy.deepcopy(model))
    except Exception as error:  # whatever its modules raise
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"verify: the model cannot be copied ({what}): call it before sharding and training"
        ) from error
    if fast:
        accelerate(copied)
    copied.train(mode == "train")
    copied.zero_grad()
    without_dropout(copied)
    return copied if dtype is None else copied.to(dtype)


def _converted(sample: Any, dtype: torch.dtype | None) -> Any:
    """Floating point tensors detached and in `dtype`."""
    if isinstance(sample, Tensor):
        moved = sample.detach()
        return moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved
    if isinstance(sample, Mapping):
        return {key: _converted(value, dtype) for key, value in sample.items()}
    if isinstance(sample, (tuple, list)):
        return tuple(_converted(value, dtype) for value in sample)
    return sample


def _precision(sample: Any) -> float:
    """The coarsest that the numbers of a sample have, or get under autocast."""
    found = [0.0]
    for _, x in named_tensors("input", sample):
        if x.is_floating_point():
            found.append(torch.finfo(x.dtype).eps)
            if x.dtype != torch.float64 and autocast_active(x.device.type):
                found.append(torch.finfo(torch.get_autocast_dtype(x.device.type)).eps)
    return max(found)


def _nudged(sample: Any) -> Any:
    """A copy whose floating point numbers have another last digit, half of them a larger one."""
    if isinstance(sample, Tensor) and sample.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, sample.shape, generator=generator).to(sample.device) * 2 - 1
        return sample.detach() * (1 + _precision(sample) * signs.to(sample.dtype))
    if isinstance(sample, Mapping):
        return {key: _nudged(value) for key, value in sample.items()}
    return tuple(map(_nudged, sample)) if isinstance(sample, (tuple, list)) else sample


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, with the path to each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_tensors(f"{name}.{index}", item)


def _default_loss(output: Any) -> Tensor:
    total: Any = 0.0
    generator = torch.Generator().manual_seed(0)
    for _, tensor in named_tensors("output", output):
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            total = total + (tensor.double() * weights.to(tensor.device)).sum()
    return total


Run = dict[str, tuple[Tensor, float]]  # by name: a tensor in float64 on the CPU, the precision that it had


def _run(model: nn.Module, sample: Any, gradients: bool, loss: Callable[[Any], Tensor] | None, seed: int) -> Run:
    """Outputs and gradients."""
    inputs = [(name, x) for name, x in named_tensors("input", sample) if x.is_floating_point()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients):
        torch.manual_seed(seed)
        for _, x in inputs:
            x.requires_grad_(gradients)
        if isinstance(sample, Mapping):
            output = model(**sample)
        else:
            output = model(*sample) if isinstance(sample, tuple) else model(sample)
        tensors = dict(named_tensors("output", output))
        if not tensors:
            raise InputError(
                f"verify: the model gives a {type(output).__name__}, in which there are no tensors to compare"
            )
        if gradients:
            total = (loss or _default_loss)(output)
            if not isinstance(total, Tensor) or total.numel() != 1 or not total.requires_grad:
                raise InputError(
                    "verify: no scalar to differentiate comes of the output: pass gradients=False or a loss"
                )
            total.backward()
            named = [*((f"gradient of {name}", p) for name, p in [*model.named_parameters(), *inputs])]
            tensors |= {name: p.grad for name, p in named if p.grad is not None}
    return {
        name: (
            x.detach().to("cpu", torch.float64, copy=True),
            torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0,
        )
        for name, x in tensors.items()
    }


def _largest(x: Tensor) -> float:
    """The largest absolute value; infinity if one is not a number."""
    return float(x.abs().nan_to_num(nan=float("inf")).max()) if x.numel() > 0 else 0.0


def _size(x: Tensor) -> float:
    """The largest absolute value but for infinity, which scores that are masked have; infinity if there is no other."""
    return _largest(x[~x.isinf()]) if not x.isinf().all() or x.numel() == 0 else math.inf


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest absolute difference; none between infinities of the same sign."""
    return _largest(torch.where(x == y, 0.0, x - y))


def _mean(x: Tensor, y: Tensor) -> float:
    """The root mean square of the differences."""
    return float((x - y).square().mean().sqrt())


def _middle(sizes: Iterable[float]) -> float:
    """The median of those that are finite."""
    finite = sorted(size for size in sizes if math.isfinite(size))
    return finite[len(finite) // 2] if finite else 0.0


def _compare(mode: str, fast: Run, source: Run, nudged: Run, exact: Run) -> Iterator[Difference]:
    """Tensor by tensor, outputs and gradients apart.

    The error of one tensor is a matter of luck, and gradients that vanish in theory are nothing but rounding. What is
    allowed therefore also follows from what the source makes of a sample that is `nudged` by one digit: a network that
    amplifies rounding amplifies that. And it follows from how precise the source is on all tensors: `common` is its
    relative error on the worst tenth of them, and a tenth of that, relative to a tensor of middle size, may come on
    top, as may one step of the tensor's own precision. Where all is as coarse as 16 bits, the largest of a tensor's
    errors may be twice that, if their root mean square is not more than twice the source's.
    """
    for kind in ("output", "gradient"):
        names = [name for name in source if name.startswith(kind)]
        sizes = {name: _size(exact[name][0]) for name in names}
        errors = {name: _distance(source[name][0], exact[name][0]) for name in names}
        middle = _middle(sizes.values())
        finite_names = [name for name in names if math.isfinite(sizes[name]) and math.isfinite(errors[name])]
        relative = sorted(errors[name] / sizes[name] for name in finite_names if sizes[name] > 1e-3 * middle)
        common = max(relative[len(relative) * 9 // 10] if relative else 0.0, 1e-6)
        for name in names:
            value, precision = fast.get(name, (torch.full((), float("inf")), 0.0))
            error, difference = _distance(value, exact[name][0]), _distance(value, source[name][0])
            finite = math.isfinite(sizes[name]) and math.isfinite(errors[name])
            moved = _distance(nudged[name][0], source[name][0]) if finite else 0.0
            usual = max(errors[name], moved if math.isfinite(moved) else 0.0, common * sizes[name])
            allowed = SLACK * usual + 0.1 * common * middle + precision * sizes[name]
            if error > allowed and common > COARSE and finite:
                mean = max(_mean(source[name][0], exact[name][0]), _mean(nudged[name][0], source[name][0]))
                allowed *= 2.0 if _mean(value, exact[name][0]) <= SLACK * mean else 1.0
            rounding = finite and error <= allowed
            yield Difference(mode, name, difference, sizes[name], error, errors[name], rounding, finite)
