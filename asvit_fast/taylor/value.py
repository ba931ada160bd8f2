"""The Taylor value, the table of rules, and what happens to a function without one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_RULES: dict[Any, Rule] = {}  # by function, for rules of users and of our own ops
_RULES_BY_NAME: dict[str, Rule] = {}  # torch.add, Tensor.add and Tensor.__add__ share one rule
OTHERWISE = (
    "*"  # the name of the rule for everything else: a function without a rule, arguments that its rule leaves out
)


class TaylorError(NotImplementedError):
    """A torch function that neither has a Taylor rule nor can be differentiated by torch's backward passes."""


class NotCovered(Exception):
    """Raised by a rule for arguments that it leaves to the rule of everything else."""


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

    def split_bias(self) -> tuple[Tensor, Tensor | None]:
        """The coefficients, and the bias that x(0) still lacks: for rules that add it on the way."""
        return self._coefficients, self._bias

    def assign(self, result: Any, reshape: bool = False) -> None:
        """Written into the memory of every order, as an in-place function does; a constant's derivatives are zero.

        ``reshape``: the same memory in a new shape, as ``unsqueeze_`` makes it.
        """
        if reshape:
            self._coefficients = result.coefficients
        elif isinstance(result, Taylor):
            self.coefficients.copy_(result.coefficients)
        else:
            self.coefficients[0].copy_(torch.as_tensor(result))
            self.coefficients[1:].zero_()

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
        if not self.shape:
            raise TypeError("len() of a 0-d tensor, here a Taylor value")
        return self.shape[0]

    def __bool__(self) -> bool:
        raise TaylorError("a Taylor value has no truth value: branch on tensor.shape or on a comparison's result")

    def _number(self, *_: Any, **__: Any) -> NoReturn:
        raise TaylorError(
            "a moving tensor becomes a number, a list or an array (item, tolist, numpy, float(x), torch.tensor(x)), "
            "which would lose its derivatives; compute with the tensor itself"
        )

    item = tolist = numpy = __float__ = __int__ = __index__ = __complex__ = _number
    __array__ = __dlpack__ = __dlpack_device__ = _number
    __array_ufunc__ = None  # numpy leaves its numbers times a Taylor value to us

    def __repr__(self) -> str:
        return f"Taylor(order={self.order}, shape={tuple(self.primal.shape)}, dtype={self.primal.dtype})"


class LinearCombination(Taylor):
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

    def split_bias(self) -> tuple[Tensor, Tensor | None]:
        return self.coefficients, None

    @property
    def shape(self) -> torch.Size:
        points = self.mix.shape[1:2]
        return self._coefficients.shape[1:] if self.basis is None else points + self.basis.shape[1:]

    def after(self, images: Tensor) -> Tensor:
        """A linear map's images [k, *other] of the basis -> its images [order + 1, n, *other] of the points."""
        return (self.mix.flatten(0, 1) @ images.flatten(1)).reshape(*self.mix.shape[:2], *images.shape[1:])


_OPERATORS = "add sub mul truediv matmul pow neg pos getitem setitem abs lt le gt ge eq ne floordiv mod contains"
_AUGMENTED = {  # x += y is x.add_(y)
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "idiv": "div_",
    "ifloordiv": "floor_divide_",
    "imod": "remainder_",
    "ipow": "pow_",
}


def _plain_number(value: Any) -> Any:
    """A number of Python's for one of numpy's."""
    return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value


def _call_method(method: Callable[..., Any], value: Taylor, /, *args: Any, **kwargs: Any) -> Any:
    return apply(method, (value, *args), kwargs)


def _add_operators() -> None:
    """Python looks operators up on the class, so ``__getattr__`` does not see them."""

    def operator(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: apply(method, (self, *args), {})

    def reflected(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: apply(function, (_plain_number(other), self), {})

    for name in _OPERATORS.split():
        setattr(Taylor, f"__{name}__", operator(getattr(Tensor, f"__{name}__")))
    for name, function in (
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("truediv", torch.div),
        ("matmul", torch.matmul),
        ("pow", torch.pow),
        ("floordiv", torch.floor_divide),
        ("mod", torch.remainder),
    ):
        setattr(Taylor, f"__r{name}__", reflected(function))
    for name, in_place in _AUGMENTED.items():
        setattr(Taylor, f"__{name}__", operator(getattr(Tensor, in_place)))
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
    name = name.strip("_") if name.startswith("__") else name
    return _AUGMENTED.get(name, name)


def _rule_by_name(func: Callable[..., Any], name: str) -> Rule | None:
    # an operator of ATen has arguments of its own, which need not be those of the function of that name
    return None if isinstance(func, (OpOverload, OpOverloadPacket)) else _RULES_BY_NAME.get(name)


def _own_rule(func: Callable[..., Any]) -> Rule | None:
    try:
        return _RULES.get(func)
    except TypeError:  # unhashable callables have no rule of their own
        return None


gradients_wanted: ContextVar[bool] = ContextVar("gradients_wanted", default=False)  # autograd records the propagation


def refuse_autograd_functions(codes: Iterable[CodeType], cause: BaseException | None = None) -> None:
    """TaylorError if one of ``codes``, which run, is the ``forward`` of an autograd.Function.

    Inside, torch records no gradients, and what it saves for its backward pass must not be a Taylor value.
    """
    running = set(codes)
    classes: list[Any] = [torch.autograd.Function]
    for function in classes:
        classes += function.__subclasses__()
        if getattr(function.forward, "__code__", None) in running:
            raise TaylorError(
                f"no Taylor rule for the autograd.Function {function.__name__}; compute under torch.no_grad() if it is "
                "made of torch functions, or replace it by those that it stands for"
            ) from cause


def _requires_grad(*values: Any) -> bool:
    leaves = pytree.tree_leaves(values, is_leaf=_is_taylor)
    return any(getattr(leaf.coefficients if _is_taylor(leaf) else leaf, "requires_grad", False) for leaf in leaves)


def _calling_codes() -> Iterator[CodeType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)`` where some arguments are Taylor values."""
    if gradients_wanted.get() and not torch.is_grad_enabled() and _requires_grad(args, kwargs):
        refuse_autograd_functions(_calling_codes())
    if (rule := _own_rule(func)) is not None:
        return rule(func, args, kwargs)
    name = function_name(func).split(".")[0]
    if "out" in kwargs:
        kwargs = dict(kwargs)
        if (out := kwargs.pop("out")) is not None:
            return _into(name, out, apply(func, args, kwargs))
    for first in ("input", "self"):
        if not args and first in kwargs and func is not torch.where:  # its first argument is the condition
            args, kwargs = (kwargs[first],), {key: value for key, value in kwargs.items() if key != first}
    rule = _rule_by_name(func, name)
    if rule is None and name.endswith("_"):
        target = args[0]
        plain_name = name.removesuffix("_")
        if not isinstance(target, Taylor):
            _refuse_writing(name)
        target.assign(apply(_out_of_place(func, plain_name), args, kwargs), reshape=plain_name in _RESHAPED)
        return target
    if "inplace" in kwargs:
        kwargs = dict(kwargs)
        if kwargs.pop("inplace"):
            if not isinstance(args[0], Taylor):
                _refuse_writing(name)
            args[0].assign(apply(func, args, kwargs))
            return args[0]
    if rule is not None:
        try:
            return rule(func, args, kwargs)
        except NotCovered:
            pass
        except _MISFITS as error:
            if rule.__module__.split(".")[0] != __name__.split(".")[0] or isinstance(error, (TaylorError, MemoryError)):
                raise
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise
            # a mistake of the user's, of which torch itself says more below, or unusual arguments
    return _RULES_BY_NAME[OTHERWISE](func, args, kwargs)


_MISFITS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError)
_RESHAPED = ("squeeze", "unsqueeze", "t", "transpose", "swapaxes", "swapdims")  # their in-place forms change the shape


def _out_of_place(func: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``relu`` for ``relu_``."""
    places = [torch.ops.aten] if isinstance(func, (OpOverload, OpOverloadPacket)) else [Tensor, torch, F]
    for place in places:
        if callable(function := getattr(place, name, None)):
            return function
    raise TaylorError(f"no Taylor rule for the in-place function {name}_; compute its result as a new tensor")


def _into(name: str, out: Any, result: Any) -> Any:
    """``out=``: every order of ``result`` is written where ``out`` says."""
    results = pytree.tree_leaves(result, is_leaf=_is_taylor)
    for target, value in zip(pytree.tree_leaves(out, is_leaf=_is_taylor), results, strict=True):
        if isinstance(target, Taylor) and target.shape == value.shape:
            target.assign(value)
        elif isinstance(target, Taylor) or isinstance(value, Taylor):
            _refuse_writing(f"{name}(out=...)")
        else:
            target.resize_(value.shape).copy_(value)
    return out


def _refuse_writing(name: str) -> NoReturn:
    raise TaylorError(
        f"{name} writes a moving tensor into an ordinary one, which cannot hold derivatives; "
        "take the result as a new tensor (x + y, torch.cat, torch.stack, torch.where)"
    )


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

    if not where:
        return func(*args, **kwargs)
    result = torch.vmap(call, randomness="same")(*(leaves[i].coefficients for i in where))
    return pytree.tree_map(moving, result)


def laid_out(coefficients: Tensor, like: Tensor) -> Tensor:
    """coefficients [orders, *shape], each order in memory as ``like`` [*shape] is, dense.

    By that, torch decides whether ``reshape`` is a view, through which somebody may write.
    """
    if coefficients.stride()[1:] == like.stride() or like.is_contiguous():
        return coefficients.contiguous() if like.is_contiguous() else coefficients
    strides = like.stride()
    dims = [0, *(d + 1 for d in sorted(range(like.dim()), key=lambda d: -strides[d]))]  # outermost first
    return coefficients.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])


def laid_out_by(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Taylor) -> Taylor:
    """``result``, each order in memory as ``func`` lays its result out: tried on tensors without memory."""
    if all(x.coefficients[0].is_contiguous() for x in taylors(args, kwargs)):
        return result

    def empty(leaf: Any) -> Any:
        leaf = leaf.coefficients[0] if isinstance(leaf, Taylor) else leaf
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    args, kwargs = pytree.tree_map(empty, (args, kwargs), is_leaf=_is_taylor)
    return Taylor(laid_out(result.coefficients, func(*args, **kwargs)))


def stacked(orders: list[Tensor]) -> Taylor:
    """A Taylor value of orders [*shape], in memory as the first is, which torch's own function has computed."""
    return Taylor(laid_out(torch.stack(orders), orders[0]))


def with_value(value: Tensor, higher: Tensor) -> Taylor:
    """A Taylor value of x(0) [*shape], as torch's own function lays it out, and derivatives [order, *shape]."""
    return Taylor(laid_out(torch.cat([value.unsqueeze(0), higher]), value))


def moving(coefficients: Tensor) -> Any:
    """A Taylor value; integers, to which x(t) was rounded, do not move."""
    return Taylor(coefficients) if coefficients.is_floating_point() or coefficients.is_complex() else coefficients[0]


def constant(value: Any, like: Taylor) -> Taylor:
    """A value that does not move."""
    if isinstance(value, (bool, int, float, complex)):  # filled where it is needed: a copy to a GPU would wait for it
        tensor = like.coefficients.new_full((), value, dtype=torch.result_type(like.primal, value))
    else:
        tensor = torch.as_tensor(value, device=like.coefficients.device)
    if tensor.dim() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        tensor = tensor.to(torch.result_type(like.primal, tensor))
    return Taylor(torch.cat([tensor.unsqueeze(0), tensor.new_zeros(like.order, *tensor.shape)]))
