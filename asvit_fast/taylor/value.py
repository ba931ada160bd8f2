"""The Taylor value, the table of rules, and what happens to a function without one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_RULES: dict[Any, Rule] = {}  # by function, for rules of users and of our own ops
_RULES_BY_NAME: dict[str, Rule] = {}  # torch.add, Tensor.add and Tensor.__add__ share one rule


class TaylorError(NotImplementedError):
    """A torch function that neither has a Taylor rule nor can be differentiated by ``torch.func``."""


class Taylor:
    """A tensor moving along a curve x(t): ``coefficients`` [order + 1, *shape] stacks x(0), x'(0) and, at order 2,
    x''(0).

    Derivatives, not Taylor coefficients: nothing is divided by a factorial. Behaves like a tensor of ``shape``: torch
    functions and methods return Taylor values, questions (``shape``, ``dtype``, ``x > 0``) are answered for x(0).
    """

    __slots__ = ("_bias", "_coefficients")

    def __init__(self, coefficients: Tensor, bias: Tensor | None = None) -> None:
        """``bias`` [C] is added to x(0) [..., C], in place, when somebody asks; ``coefficients`` is fresh memory
        then."""
        self._coefficients = coefficients
        self._bias = bias

    @property
    def coefficients(self) -> Tensor:
        if self._bias is not None:
            self._coefficients[0].add_(self._bias)
            self._bias = None
        return self._coefficients

    def apart(self) -> tuple[Tensor, Tensor | None]:
        """The coefficients, and the bias that x(0) still lacks: for rules that add it on the way."""
        return self._coefficients, self._bias

    @property
    def order(self) -> int:
        return self._coefficients.shape[0] - 1

    @property
    def shape(self) -> torch.Size:
        return self._coefficients.shape[1:]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def primal(self) -> Tensor:
        """x(0), [*shape]."""
        return self.coefficients[0]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)  # an AttributeError names the attribute
        if callable(attribute):
            return functools.partial(_call_method, attribute, self)
        return apply(attribute.__get__, (self,), {})

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __len__(self) -> int:
        return self.primal.shape[0]

    def __bool__(self) -> bool:
        raise TaylorError("a Taylor value has no truth value: branch on tensor.shape or on a comparison's result")

    def __repr__(self) -> str:
        return f"Taylor(order={self.order}, shape={tuple(self.primal.shape)}, dtype={self.primal.dtype})"


class Combination(Taylor):
    """n points whose orders all are combinations of few tensors, as those of a circle are of two.

    ``mix`` [order + 1, n, k] times ``basis`` [k, *shape]. A linear map acts on the k tensors (``after``); anything else
    finds an ordinary Taylor value of n points.
    """

    __slots__ = ("basis", "mix")

    def __init__(self, mix: Tensor, basis: Tensor) -> None:
        super().__init__(mix)  # until somebody asks
        self.mix = mix
        self.basis: Tensor | None = basis  # None once the points may have been written to

    @property
    def coefficients(self) -> Tensor:
        if self.basis is not None:
            self._coefficients = self.after(self.basis)
            self.basis = None
        return self._coefficients

    def apart(self) -> tuple[Tensor, Tensor | None]:
        return self.coefficients, None

    @property
    def shape(self) -> torch.Size:
        points = self.mix.shape[1:2]
        return self._coefficients.shape[1:] if self.basis is None else points + self.basis.shape[1:]

    def after(self, images: Tensor) -> Tensor:
        """A linear map's images [k, *other] of the basis -> its images [order + 1, n, *other] of the points."""
        return (self.mix.flatten(0, 1) @ images.flatten(1)).reshape(*self.mix.shape[:2], *images.shape[1:])


def _call_method(method: Callable[..., Any], value: Taylor, *args: Any, **kwargs: Any) -> Any:
    return apply(method, (value, *args), kwargs)


def _add_operators() -> None:
    """Python looks operators up on the class, so ``__getattr__`` does not see them."""

    def operator(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: apply(method, (self, *args), {})

    def reflected(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: apply(function, (other, self), {})

    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "matmul",
        "pow",
        "neg",
        "getitem",
        "setitem",
        "abs",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
    ]:
        setattr(Taylor, f"__{name}__", operator(getattr(Tensor, f"__{name}__")))
    for name, function in (
        ("radd", torch.add),
        ("rsub", torch.sub),
        ("rmul", torch.mul),
        ("rtruediv", torch.div),
        ("rmatmul", torch.matmul),
        ("rpow", torch.pow),
    ):
        setattr(Taylor, f"__{name}__", reflected(function))
    Taylor.__hash__ = object.__hash__  # type: ignore[method-assign]


_add_operators()


def register_rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Decorator: ``rule(func, args, kwargs)`` computes ``func`` when an argument is a Taylor value.

    Args:
        functions: torch functions (or any function that honours ``__torch_function__``); a string stands for every
            torch function and Tensor method of that name. A rule for a function goes before one for its name.
    """

    def register(rule: Rule) -> Rule:
        for function in functions:
            if isinstance(function, str):
                _RULES_BY_NAME[function] = rule
            else:
                _RULES[function] = rule
        return rule

    return register


def function_name(func: Callable[..., Any]) -> str:
    """``add`` for torch.add, Tensor.add, Tensor.__add__; ``shape`` for the getter of Tensor.shape."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]
    return name.strip("_") if name.startswith("__") else name


def _find_rule(func: Callable[..., Any]) -> tuple[Rule | None, bool]:
    """The rule, and whether ``func`` is the in-place form (``add_``) of the function that the rule is for."""
    try:
        if func in _RULES:
            return _RULES[func], False
    except TypeError:  # unhashable callables have no rule of their own
        pass
    name = function_name(func)
    if name in _RULES_BY_NAME:  # copy_ and fill_ have rules of their own
        return _RULES_BY_NAME[name], False
    if name.endswith("_") and name[:-1] in _RULES_BY_NAME:
        return _RULES_BY_NAME[name[:-1]], True
    return None, False


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` where some arguments are Taylor values."""
    rule, in_place = _find_rule(func)
    asked = kwargs.get("inplace", False)
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    if in_place or asked:
        result = (rule or _fallback)(_out_of_place(func), args, kwargs)
        args[0].coefficients.copy_(result.coefficients)
        return args[0]
    return (rule or _fallback)(func, args, kwargs)


def _out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    name = function_name(func)
    return getattr(Tensor, name[:-1]) if name.endswith("_") else func


def taylors(*values: Any) -> list[Taylor]:
    """Every Taylor value in (nested) arguments."""
    return [leaf for leaf in pytree.tree_leaves(values, is_leaf=_is_taylor) if isinstance(leaf, Taylor)]


def _is_taylor(value: Any) -> bool:
    return isinstance(value, Taylor)


def primals(values: Any) -> Any:
    """Nested arguments with every Taylor value replaced by its x(0)."""
    return pytree.tree_map(lambda v: v.primal if isinstance(v, Taylor) else v, values, is_leaf=_is_taylor)


def mapped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` applied to each order alone: what a function that is linear in its Taylor arguments does. ONE batched
    call."""
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_taylor)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Taylor)]

    def call(*orders: Tensor) -> Any:
        filled = list(leaves)
        for i, order in zip(where, orders, strict=True):
            filled[i] = order
        new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
        return func(*new_args, **new_kwargs)

    result = torch.vmap(call, randomness="same")(*(leaves[i].coefficients for i in where))
    return pytree.tree_map(Taylor, result)


def constant(value: Any, like: Taylor) -> Taylor:
    """A value that does not move."""
    tensor = torch.as_tensor(value, device=like.coefficients.device)
    if not tensor.is_floating_point() or tensor.dim() == 0:
        tensor = tensor.to(like.coefficients.dtype)
    return Taylor(torch.cat([tensor.unsqueeze(0), tensor.new_zeros(like.order, *tensor.shape)]))


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"asvit_fast.taylor: no rule for {name}; torch.func differentiates it on its own (correct, slower). "
        "Add a rule with asvit_fast.taylor.register_rule.",
        stacklevel=5,
    )


def _fallback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One function through ``torch.func``, nested for order 2."""
    name = function_name(func)
    namespace = getattr(func, "namespace", getattr(func, "_qualified_op_name", "aten").split("::")[0])
    if namespace not in ("aten", "prims"):
        raise TaylorError(
            f"no Taylor rule for the custom op {name}, whose forward-mode tangent torch would take for zero; "
            "add one with asvit_fast.taylor.register_rule"
        )
    _warn_once(name)
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_taylor)
    moving = {i: leaf.coefficients for i, leaf in enumerate(leaves) if isinstance(leaf, Taylor)}
    order = next(iter(moving.values())).shape[0] - 1
    one = next(iter(moving.values())).new_ones(())

    output, output_spec = pytree.tree_flatten(func(*primals(args), **primals(kwargs)))
    floating = [i for i, leaf in enumerate(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def at(time: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, c in moving.items():
            filled[i] = c[0] + time * c[1] if order == 1 else c[0] + time * (c[1] + 0.5 * time * c[2])
        new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
        leaves_at = pytree.tree_leaves(func(*new_args, **new_kwargs))
        return tuple(leaves_at[i] for i in floating)

    def velocity(time: Tensor) -> Any:
        return torch.func.jvp(at, (time,), (one,))

    zero = torch.zeros_like(one)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention of torch with forward mode
            if order == 1:
                coefficients = velocity(zero)
            else:
                both: Any = torch.func.jvp(velocity, (zero,), (one,))
                coefficients = (*both[0], both[1][1])
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaylorError(
            f"no Taylor rule for {name}, and torch.func cannot differentiate it ({reason}); "
            "add one with asvit_fast.taylor.register_rule"
        ) from error
    for i, *orders in zip(floating, *coefficients, strict=True):  # the rest (None, indices) does not move
        output[i] = Taylor(torch.stack(orders))
    return pytree.tree_unflatten(output, output_spec)
