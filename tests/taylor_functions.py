"""Functions of numbers, reductions, shapes, indices, products: each of one tensor [5, 6]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from curves import INDEX, MASK, TARGET, Case, P, V, W, draw, image, inside, positive, signal, volume
from torch import Tensor


def in_place(name: str, *args: Any, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    """x.name_(...) on a copy, seen through a view of it."""

    def function(x: Tensor) -> Tensor:
        y = x * 1
        view = y[1:]
        getattr(y, name + "_")(*args, **kwargs)
        return torch.cat([y, view])

    return function


UNARY = """
    abs absolute acos acosh angle asin asinh atan atanh ceil clone contiguous conj cos cosh deg2rad digamma erf
    erfc erfinv exp exp2 expm1 fix floor frac lgamma log log10 log1p log2 logit nan_to_num neg positive rad2deg
    reciprocal relu round rsqrt selu sgn sigmoid sign sin sinc sinh sqrt square tan tanh trunc i0 flatten ravel t
    detach diff std var prod sum mean nansum nanmean amax amin max min median nanmedian msort aminmax trace triu
    tril std_mean var_mean fliplr rot90 adjoint mT norm unsqueeze_copy
"""
DOMAIN = {
    **dict.fromkeys(("acos", "asin", "atanh", "erfinv"), inside),
    **dict.fromkeys(["log", "log10", "log1p", "log2", "rsqrt", "sqrt", "digamma", "lgamma", "reciprocal"], positive),
    "acosh": lambda x: positive(x) + 1,
    "logit": torch.sigmoid,
}
SPECIAL = """
    entr ndtri i0 i0e i1 i1e erfcx expit log_ndtr ndtr sinc psi exp2 gammaln logit log1p
"""
ACTIVATIONS = """
    relu relu6 elu selu celu gelu silu mish softplus softsign tanhshrink hardtanh hardswish hardsigmoid hardshrink
    softshrink leaky_relu logsigmoid sigmoid tanh glu rrelu
"""
LOSSES = """
    mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss multilabel_soft_margin_loss
    binary_cross_entropy_with_logits hinge_embedding_loss
"""
TWO = """
    add sub mul div true_divide maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 fmod remainder copysign
    cosine_similarity dist dot_flat inner outer_flat kron matmul cross_flat vdot_flat pow float_power xlogy ldexp
    special_xlog1py special_xlogy heaviside
"""

CASES: dict[str, Case] = {}


def _domain(name: str, function: Callable[..., Any]) -> Case:
    before = DOMAIN.get(name, lambda x: x)
    return lambda x: function(before(x))


def _two(name: str) -> Iterator[tuple[str, Case]]:
    function = getattr(torch, name.removesuffix("_flat"), None) or getattr(torch.special, name.removeprefix("special_"))
    if name.endswith("_flat"):
        short = slice(0, 3)
        yield "", lambda x: function(x[0, short], (x * W)[1, short])
        yield ".left", lambda x: function(x[0, short], W[1, short])
        yield ".right", lambda x: function(W[0, short], x[1, short])
        return
    if "xlog" in name:
        yield "", lambda x: function(x, positive(x + V))
        yield ".left", lambda x: function(x, P)
        yield ".right", lambda x: function(W, positive(x))
        return
    if name in ("fmod", "remainder"):
        yield "", lambda x: function(x, positive(x + V))
        yield ".left", lambda x: function(x, V)
        yield ".right", lambda x: function(W, positive(x))
        return
    base = positive if name in ("pow", "float_power") else (lambda x: x)
    if name in ("matmul", "inner"):
        yield "", lambda x: function(x, x.mT if name == "matmul" else x * W)
        yield ".left", lambda x: function(x, W.mT if name == "matmul" else W)
        yield ".right", lambda x: function(W.mT if name == "matmul" else W, x)
        return
    yield "", lambda x: function(base(x), x + V)
    yield ".left", lambda x: function(base(x), V)
    yield ".right", lambda x: function(base(W), x)


for _name in UNARY.split():
    _method = getattr(Tensor, _name, None)
    if _method is None or not callable(_method):
        CASES[_name] = (
            (lambda n: lambda x: getattr(x, n))(_name) if _method else _domain(_name, lambda x: x.unsqueeze(0))
        )
    else:
        CASES[_name] = _domain(_name, (lambda n: lambda x: getattr(x, n)())(_name))
for _name in SPECIAL.split():
    _before = {"ndtri": torch.sigmoid, "logit": torch.sigmoid}.get(_name, positive)
    CASES[f"special.{_name}"] = (lambda f, b: lambda x: f(b(x)))(getattr(torch.special, _name), _before)
for _name in ACTIVATIONS.split():
    CASES[f"F.{_name}"] = (lambda f: lambda x: f(2 * x))(getattr(F, _name))
for _name in LOSSES.split():
    _goal = {"binary_cross_entropy_with_logits": MASK.double(), "multilabel_soft_margin_loss": MASK.double()}.get(
        _name, W.sign() if "margin" in _name or "hinge" in _name else W
    )
    for _reduction in ("mean", "sum"):
        CASES[f"F.{_name}.{_reduction}"] = (lambda f, g, r: lambda x: f(x, g, reduction=r))(
            getattr(F, _name), _goal, _reduction
        )
for _name in TWO.split():
    for _suffix, _case in _two(_name):
        CASES[_name + _suffix] = _case


def _augmented(x: Tensor) -> Tensor:
    """Seen through a view: += and its kin write into the memory that both share."""
    y = x * 1
    view = y[0]
    y += W
    y *= x
    y -= 2
    y /= P
    y **= 2
    view += 1
    return torch.cat([y, view[None]])


def _writes(x: Tensor) -> Tensor:
    y = x * 1
    y[1:3] = x[:2] * x[:2]
    y[0, 0] = 5.0
    y[MASK] = 2.0
    y[INDEX[1]] = x[:3]
    y[:, 1].mul_(x[:, 0])
    y.detach().add_(1)
    return y


CASES |= {
    # arithmetic and Python's operators
    "operators": lambda x: (x // 2 + x % 3 + (+x) - 7 % positive(x) + 2 // positive(x), x**2, 2**x, 1 / x, -x, abs(x)),
    "reflected": lambda x: tuple(method(W, x) for method in (Tensor.__rsub__, Tensor.__rmod__, Tensor.__rdiv__)),
    "augmented": lambda x: _augmented(x),
    "keywords": lambda x: (
        torch.mul(input=x, other=W),
        torch.div(input=x, other=P),
        torch.add(input=x, other=W, alpha=2),
        torch.softmax(input=x, dim=1),
        torch.tanh(input=x),
        F.gelu(input=x),
        torch.where(condition=MASK, input=x, other=W),
        torch.clamp(input=x, min=-0.5),
        torch.pow(input=x, exponent=3),
    ),
    "out": lambda x: (lambda y: (torch.mul(x, x, out=y), y))(x * 0),
    "pow.integers": lambda x: torch.stack([x**n for n in range(-2, 5)]),
    "pow.tensor": lambda x: x ** torch.arange(6.0, dtype=torch.float64),
    "pow.roots": lambda x: positive(x) ** torch.tensor([0.5, 1.5, -0.5, 2.5, 0.0, 1.0], dtype=torch.float64),
    "div.floor": lambda x: torch.div(x, P, rounding_mode="floor"),
    "div.trunc": lambda x: torch.div(W, positive(x), rounding_mode="trunc"),
    "floor_divide": lambda x: torch.floor_divide(x, P),
    "addcmul": lambda x: torch.addcmul(x, x, W, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(W, x, positive(x)),
    "lerp": lambda x: torch.lerp(x, W, 0.3) + torch.lerp(W, x, x),
    "clamp.tensor": lambda x: torch.clamp(x, -P, P) + torch.clamp(W, min=x - 0.2),
    "mvlgamma": lambda x: torch.mvlgamma(positive(x) + 2, 2),
    "polygamma": lambda x: torch.polygamma(1, positive(x)),
    "frexp": lambda x: torch.frexp(x),
    "heaviside.values": lambda x: torch.heaviside(W * 0, x),
    "logical": lambda x: x * torch.logical_and(x > 0, x < 1) + torch.isfinite(x),
    # reductions and choices
    "reductions": lambda x: (
        x.sum((0, 1)),
        x.mean(1, keepdim=True),
        x.var(1),
        x.std(0, unbiased=False),
        x.amax((0, 1)),
        x.amin(1, True),
        x.logsumexp((0, 1)),
        x.logsumexp(0, keepdim=True),
        x.norm(dim=1),
        x.norm(p=3),
        x.norm(p=1, dim=0),
        x.prod(0),
    ),
    "choices": lambda x: (
        x.max(1),
        x.min(0, keepdim=True),
        x.median(1),
        x.median(),
        x.nanmedian(0),
        x.mode(1),
        x.sort(0),
        x.cummax(1),
        x.sort(dim=1, descending=True),
        x.sort(stable=True),
        x.topk(2),
        x.topk(k=3, dim=0, largest=False),
        x.max(),
        x.kthvalue(2),
        x.kthvalue(k=1, dim=0, keepdim=True),
        x.cummin(0),
        x.max(W),
        x.min(W),
        torch.max(W, x),
        x.amax(),
    ),
    "quantile": lambda x: (x.quantile(0.3), x.quantile(torch.tensor([0.1, 0.8]).double(), dim=1), x.nanquantile(0.5)),
    "cumprod": lambda x: (
        x.cumprod(1),
        x.cumsum(0),
        x.logcumsumexp(1),
        torch.cumulative_trapezoid(x),
        torch.trapezoid(x, dim=0),
    ),
    "renorm": lambda x: torch.renorm(x, 2, 0, 1.0),
    "cov": lambda x: (torch.cov(x), torch.corrcoef(x)),
    "questions": lambda x: (
        x * torch.bucketize(x, torch.linspace(-2, 2, 5).double()),
        x * x.argmax(),
        x * x.isnan(),
        x * x.signbit(),
        x * x.lt(W),
        x * x.logical_not(),
        x * x.count_nonzero(),
        torch.histc(x, 3, -9, 9),
        x.size(0) * x,
        x * torch.searchsorted(P.sort()[0], x),
        x * x.argsort(1),
        x * x.long(),
        x * torch.isclose(x, W),
        x * (x == x),
        x * torch.floor_divide(x, P),
    ),
    # shapes, pieces and indices
    "shapes": lambda x: (
        x.view(6, 5),
        x.reshape(3, 10),
        x.unflatten(1, (2, 3)),
        x.permute(1, 0),
        x.movedim(0, 1),
        x.unsqueeze(0).squeeze(),
        x.expand(2, 5, 6),
        x.expand_as(W[None]),
        x.view_as(W),
        x.tile(2),
        x.repeat(2, 1),
        x.repeat_interleave(2, dim=0),
        x.roll(1, 0),
        x.flip(0),
        x.type_as(W),
        x.to(W),
        x.diagonal(),
        torch.diag_embed(x),
        torch.block_diag(x, W),
        torch.atleast_3d(x),
        torch.broadcast_tensors(x, W[0]),
        torch.meshgrid(x[0], W[0], indexing="ij"),
        x.H,
        x.real,
    ),
    "pieces": lambda x: (
        x.chunk(2),
        x.split(2),
        x.tensor_split(3),
        x.unbind(1),
        x.hsplit(2),
        x.select(1, 2),
        x.narrow(0, 1, 3),
        x.unfold(1, 3, 2),
        torch.cat([x, W]),
        torch.stack((x, V), -1),
        torch.hstack([x, W]),
        torch.vstack([W, x]),
        torch.dstack([x, W]),
        torch.column_stack([x, W]),
        torch.cat([x, W.float()], 1),
        list(x),
        torch.diff(x, prepend=W[:, :1]),
    ),
    "indices": lambda x: (
        x[1],
        x[..., None],
        x[1:, ::2],
        x[INDEX],
        x[MASK],
        x[x > 0],
        x[:, [0, -1]],
        x.gather(0, INDEX),
        x.take(INDEX),
        x.index_select(1, INDEX[0]),
        torch.take_along_dim(x, x.argsort(0), 0),
        x.masked_select(MASK),
        torch.where(MASK, x, 2.0),
        torch.where(x > 0, W, x),
        x.where(MASK, W),
        x.masked_fill(MASK, 3.0),
        F.one_hot(TARGET),
    ),
    "writes": lambda x: (
        x.scatter(0, INDEX, W),
        W.scatter(0, INDEX, x),
        x.scatter(0, INDEX, 2.0),
        x.scatter_add(0, INDEX, x),
        x.index_add(1, INDEX[0], W[:, :3], alpha=2),
        x.index_copy(0, INDEX[1], W[:3]),
        W.index_copy(0, INDEX[1], x[:3]),
        x.index_put((INDEX[0],), x[0]),
        x.index_put((INDEX[1],), x[:3], accumulate=True),
        x.index_fill(0, INDEX[0], 2.0),
        x.masked_scatter(MASK, W),
        torch.slice_scatter(W, x[:2], 0, 1, 3),
        torch.select_scatter(x, W[0], 0, 2),
        torch.diagonal_scatter(W, x[0, :5]),
        x.put(INDEX, W[:2, :3]),
        x.scatter_reduce(0, INDEX, W[:2, :3], "amax"),
    ),
    "writes in place": lambda x: _writes(x),
    "in place.masked_fill": in_place("masked_fill", MASK, 1.0),
    "in place.clamp": in_place("clamp", -1, 1),
    "in place.floor": in_place("floor"),
    "in place.exp": in_place("exp"),
    "in place.pow": in_place("pow", 3),
    "in place.addcmul": in_place("addcmul", W, V),
    "in place.cumsum": in_place("cumsum", 0),
    "in place.index_add": in_place("index_add", 0, INDEX[0], W[:3]),
    "in place.scatter": in_place("scatter", 0, INDEX, W),
    "in place.zero": in_place("zero"),
    "in place.fill": in_place("fill", value=2.0),
    "in place.copy": in_place("copy", W),
    "in place.digamma": in_place("lgamma"),
    "in place.functional": lambda x: (
        F.elu_(x * 2),
        F.relu(x * 1, inplace=True),
        F.hardswish(x * 2, inplace=True),
        torch.celu_(x * 1),
    ),
    "in place.shapes": lambda x: (x * 1).unsqueeze_(0).transpose_(0, 1).squeeze_(1),
    # products
    "products": lambda x: (
        x.mm(x.T),
        x.T @ W,
        x.mv(x[0]),
        torch.bmm(x[None], W.T[None]),
        torch.addmm(x[:, :5], x, W.T, beta=0.5, alpha=2),
        torch.addmv(x[:, 0], x, W[0]),
        torch.addr(x, W[:, 0], x[0]),
        torch.baddbmm(W[None, :, :5], x[None], x.T[None]),
        torch.chain_matmul(x, W.T, x),
        torch.linalg.multi_dot([x, W.T, V]),
        torch.tensordot(x, W, dims=2),
        torch.ger(x[0], W[0]),
    ),
    "einsum": lambda x: (
        torch.einsum("ij,kj->ik", x, x),
        torch.einsum("ij,ij,ij->i", x, W, x),
        torch.einsum("ij,ij,ij->j", x, x, x),
    ),
    "bilinear": lambda x: F.bilinear(x, x, draw(3, 4, 6, 6), draw(4, 4)),
    "linear": lambda x: (
        F.linear(x, W, W[:, 0]),
        F.linear(W, x, x[:, 0]),
        F.linear(x, x),
        F.linear(x, W[0]),
        F.linear(x, W, x[:, 0]),
    ),
    "conv1d": lambda x: F.conv1d(signal(x), draw(1, 4, 3, 3), draw(2, 4), padding="same", dilation=2),
    "conv2d": lambda x: F.conv2d(image(x), draw(1, 4, 1, 2, 2), draw(2, 4), stride=2, padding=1, groups=2),
    "conv2d.weight": lambda x: F.conv2d(draw(1, 2, 3, 6, 7), x[:, :6].reshape(5, 3, 2, 1), bias=x[:, 0]),
    "conv2d.both": lambda x: F.conv2d(image(x), x[:4, :2].reshape(2, 2, 2, 1), x[:2, 0]),
    "conv3d": lambda x: F.conv3d(volume(x), draw(1, 2, 1, 2, 2, 2)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(
        image(x), draw(1, 2, 3, 2, 2), draw(2, 3), stride=2, output_padding=1
    ),
}
