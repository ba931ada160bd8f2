"""What the classes have in common that ``accelerate`` gives to modules of other packages.

A replacement is a subclass of the class that it replaces, `source`, and changes methods only: state, parameters, hooks
and training mode stay those of the instance, whose ``__class__`` alone is set. Modules inside are called as the source
calls them. Where a fused op takes a module's part (a softmax, a dropout's probability, the weights of a convolution and
a norm), `obstacle` says why that would change results: hooks, another type, a quantised or sharded weight. It is asked
before the swap and at every call, as users may add a hook later; the source's method runs then, which is said once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import backends
from ..errors import InputError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DROPOUT = "attention dropout has no kernel: torch's scaled_dot_product_attention runs instead, with copies"


class Replacement:
    """Mixin, first of the bases; the second is `source`."""

    source: ClassVar[type[nn.Module]]
    inner: ClassVar[tuple[tuple[str, type[Replacement]], ...]] = ()  # children that are replaced with it, by attribute
    only_inside: ClassVar[str | None] = None  # the class that must hold it, where a replacement has another signature

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """timm's feature extraction by torch.fx takes a replacement as it is: its Python branches on sizes."""
        super().__init_subclass__(**kwargs)
        register_notrace_module(cls)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked by torch.jit.script, which cannot compile a replacement."""
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__} of an accelerated network: "
            "call asvit_fast.restore(model) first, or use torch.jit.trace, torch.compile or torch.export"
        )

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Why the fused op must not take the part of this instance's submodules; None if nothing is in the way."""
        return None

    @classmethod
    def gainless(cls, module: Any) -> str | None:
        """Why nothing would be gained for this instance; None if something would."""
        return None

    def usable(self) -> bool:
        """Whether the fused path may run at this call; where not, says so once."""
        why = self.obstacle(self)
        for name, kind in self.inner:
            child = getattr(self, name)
            if not isinstance(child, kind):
                why = why or f"its {name} was replaced by a {type(child).__name__}"
            else:
                why = why or child.obstacle(child)
        if why is not None:
            name = self.source.__name__
            backends.notify_once((name, why), f"asvit_fast runs {name} as its package does: {why}")
        return why is None


_bound: dict[tuple[type, type], type[Replacement]] = {}


def bound(replacement: type[Replacement], source: type[nn.Module]) -> type[Replacement]:
    """A replacement for the classes of one package is itself; one that can only be recognised when it is met, of code
    that is no package, is derived from it here, once for each."""
    if "source" in vars(replacement):
        return replacement
    key = (replacement, source)
    if key not in _bound:
        _bound[key] = type(replacement.__name__, key, {"source": source})
    return _bound[key]


def overridden(replacement: type[Replacement]) -> set[str]:
    """The methods of the source that a replacement has another version of."""
    own = [kind for kind in replacement.__mro__ if issubclass(kind, Replacement) and kind is not Replacement]
    names = {name for kind in own for name, value in vars(kind).items() if inspect.isfunction(value)}
    return {name for name in names if hasattr(replacement.source, name) and not name.startswith("__")}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    return any(len(getattr(module, hooks)) > 0 for hooks in HOOKS)


def source_type(module: object) -> type:
    """The class of a module, or that which it was before ``accelerate``."""
    kind = type(module)
    return kind.source if issubclass(kind, Replacement) and "source" in vars(kind) else kind


def why_not_bypass(module: Any, **parts: type | tuple[type, ...]) -> str | None:
    """Why the named submodules cannot be taken out of a computation: they are not exactly of the types given, have
    hooks, or weights that are not plain tensors."""
    for name, kinds in parts.items():
        part = getattr(module, name)
        if source_type(part) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            return f"its {name} is a {type(part).__name__}"
        if part is None:
            continue
        if has_hooks(part):
            return f"its {name} has hooks"
        for key, weight in part._parameters.items():
            if weight is None or torch.compiler.is_compiling():
                continue
            if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
                return f"the {key} of its {name} is a {type(weight).__name__}"
    return None


def padding_token(
    qkv: Callable[[Tensor], Tensor], x: Tensor, window: tuple[int, int], norm: nn.Module | None = None
) -> Tensor | None:
    """What the projection makes of a zero token: [channels], or None if windows divide the map x [B, H, W, C]."""
    if x.shape[1] % window[0] == 0 and x.shape[2] % window[1] == 0:
        return None
    zero = x.new_zeros(1, 1, 1, x.shape[3])
    return qkv(zero if norm is None else norm(zero))[0, 0, 0]


def attention_dropout(probability: float, training: bool) -> float:
    """The probability of dropout that applies now; the first time it is not 0, says what that costs."""
    if not training or probability == 0.0:
        return 0.0
    _say_dropout()
    return probability


@torch.compiler.assume_constant_result  # a warning would break the graph: this one is given while tracing
def _say_dropout() -> None:
    backends.notify_once(DROPOUT, f"asvit_fast: {DROPOUT}")


def by_projection(qkv: Tensor, num_heads: int) -> Tensor:
    """Channels ordered [head][q | k | v][d] as the op has them, [q | k | v][head][d]: [..., 3*heads*d] -> the same."""
    return qkv.unflatten(-1, (num_heads, 3, -1)).transpose(-3, -2).flatten(-3)


def cosine_attention(qkv: Tensor, num_heads: int, logit_scale: Tensor) -> Tensor:
    """Queries and keys of unit length, queries times their head's factor: softmax attention of scale 1 is cosine
    attention then (Swin V2, arXiv 2111.09883, equation 2).

    Args:
        qkv: [..., 3*heads*d]. logit_scale: the logarithm of the factors, any shape with one number per head.
    """
    qkv = qkv.unflatten(-1, (3, num_heads, -1))
    factor = logit_scale.flatten().clamp(max=math.log(100.0)).exp().unsqueeze(1)  # [heads, 1]
    q, k = F.normalize(qkv[..., :2, :, :], dim=-1).unbind(-3)  # [..., heads, d]
    return torch.stack([(q * factor).to(qkv.dtype), k.to(qkv.dtype), qkv[..., 2, :, :]], dim=-3).flatten(-3)
