"""Functions without a rule of their own: torch's backward passes, differentiated again.

A backward pass s(u, t) = <u, y'(t)> is linear in the cotangent u, so that y' = ds/du and y'' = d/du (ds/dt), in reverse
mode only. torch's forward mode is wrong for several functions, above all where it is nested (pytorch/pytorch#196700).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp.decompositions import grid_sampler_2d
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .. import backends
from ..errors import first_line
from ..ops.transforms import transform_active
from .value import OTHERWISE, Taylor, TaylorError, function_name, laid_out, primals, register_rule, taylors

RANDOM = "what it draws at random has no derivative"
WRITES = "it changes the tensor itself; compute a new one"
MEMORY = "it depends on how the tensor lies in memory; use narrow, select, unfold or reshape"
STEPS = "it is a step function, whose straight-through gradient is not its derivative"
GRAPH = "a moving tensor has no place in autograd's graph"
REFUSED: dict[str, str] = {
    name: reason
    for names, reason in {
        "bernoulli normal poisson binomial": RANDOM,
        "resize resize_as set map map2 apply map_ map2_ apply_": WRITES,
        "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine fused_moving_avg_obs_fake_quant": STEPS,
        "as_strided as_strided_copy as_strided_scatter new_empty_strided": MEMORY,
        "linalg_eig": "the phase of its eigenvectors is left to the library; use torch.linalg.eigvals, or eigh",
        "register_hook retain_grad backward": GRAPH,
        "deepcopy reduce_ex": "use clone",
        "_pack_padded_sequence": "a PackedSequence does not move; pass the padded sequences",
    }.items()
    for name in names.split()
}
_STILL = (Tensor, bool, int, str, type(None), torch.dtype, torch.device, torch.layout)  # indices, truth values, sizes
_pullback: Callable[..., Any] = torch.func.vjp

# which of a function's outputs are steps between which nothing moves, though they are floating point
STEADY = {"linalg_lu": (0,), "lu_unpack": (0,)}


@register_rule(OTHERWISE)
def reverse_over_reverse(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on its own, differentiated along the curve of its Taylor arguments."""
    name = function_name(func).split(".")[0]
    namespace = getattr(func, "namespace", getattr(func, "_qualified_op_name", "aten").split("::")[0])
    if namespace not in ("aten", "prims"):
        raise TaylorError(
            f"no Taylor rule for the custom op {name}, whose second derivative torch does not know; "
            "add one with asvit_fast.taylor.register_rule"
        )
    if name in REFUSED:
        raise TaylorError(f"{name} cannot be propagated: {REFUSED[name]}")
    func = _ELEMENTARY.get(name, func)
    values, tree = pytree.tree_flatten(_undisturbed(func, args, kwargs))  # torch's own error, if it is a mistake
    moving = [i for i, value in enumerate(values) if _moves(value)]
    if not moving:
        if not all(isinstance(value, _STILL) for value in values):  # memory itself, for another library, or a number
            raise TaylorError(f"{name} takes the numbers out of a moving tensor, which would lose its derivatives")
        return pytree.tree_unflatten(values, tree)
    backends.notify_once(
        ("taylor", name),
        f"asvit_fast.taylor: no rule for {name} with these arguments; torch's backward pass, differentiated again, "
        "takes its place (slower). Add a rule with asvit_fast.taylor.register_rule.",
    )
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention of torch that can be differentiated twice
            derivatives = tuple(_derivatives(name, func, args, kwargs, [values[i] for i in moving], moving))
    except (RuntimeError, TypeError, AssertionError) as error:
        if isinstance(error, (TaylorError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise
        raise TaylorError(
            f"no Taylor rule for {name}, and torch cannot differentiate it often enough ({first_line(error)}); "
            "add one with asvit_fast.taylor.register_rule"
        ) from error
    for place, value, *orders in zip(moving, *derivatives, strict=True):
        # where a derivative is infinite, the time 0 does not take it away: the value is that of x(0)
        safe = torch.where(value.isnan(), values[place], value)
        values[place] = Taylor(laid_out(torch.stack([safe, *orders]), values[place]))
    _refuse_points_without_derivative(name, taylors(args, kwargs), taylors(values))
    return pytree.tree_unflatten(values, tree)


def _refuse_points_without_derivative(name: str, inputs: list[Taylor], outputs: list[Taylor]) -> None:
    """Refuse derivatives that are not numbers, as torch's formulas give where they divide 0 by 0."""
    if transform_active() or torch.compiler.is_compiling() or any(x.coefficients.is_meta for x in inputs):
        return
    if not all(bool(x.coefficients.isfinite().all()) for x in inputs):
        return
    for y in outputs:
        if bool((y.coefficients[1:].isnan() & y.primal.isfinite()).any()):
            raise TaylorError(
                f"no Taylor rule for {name}, and torch's formula for its derivative is not a number at this point; "
                "add one with asvit_fast.taylor.register_rule"
            )


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _undisturbed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of x(0), leaving buffers and random numbers as they are, for it runs once more."""
    copied = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, primals((args, kwargs)))
    devices = {value.coefficients.device for value in taylors(args, kwargs)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            if device.type == "cuda":
                stack.enter_context(torch.random.fork_rng(devices=[device]))
        return func(*copied[0], **copied[1])


def _derivatives(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: list[Tensor],
    places: list[int],
) -> Iterator[tuple[Tensor, ...]]:
    """Value and derivatives of the moving outputs (``values`` at ``places``): an iterator over the orders."""
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Taylor))
    curves = {i: leaf.coefficients for i, leaf in enumerate(leaves) if isinstance(leaf, Taylor)}
    first = next(iter(curves.values()))
    order = len(first) - 1
    zero = torch.zeros((), dtype=first.dtype.to_real(), device=first.device)  # a real time, for complex values too
    one = torch.ones_like(zero)

    def at(time: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, c in curves.items():
            filled[i] = c[0] + time * c[1] if order == 1 else c[0] + time * (c[1] + 0.5 * time * c[2])
        new_args, new_kwargs = pytree.tree_unflatten(filled, tree)
        outputs = pytree.tree_leaves(func(*new_args, **new_kwargs))
        result = tuple(outputs[place] for place in places)
        for place, output in zip(places, result, strict=True):
            if not output.requires_grad and output.numel() and place not in STEADY.get(name, ()):
                raise TaylorError(
                    f"no Taylor rule for {name}, whose output torch does not differentiate; "
                    "add one with asvit_fast.taylor.register_rule"
                )
        return result

    def pulled_back(cotangents: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """((s,) or (s, ds/dt), y) at t = 0."""

        def speed(time: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, pull = _pullback(at, time)
            return pull(cotangents)[0], y

        if order == 1:
            s, y = speed(zero)
            return (s,), y
        s, pull, y = _pullback(speed, zero, has_aux=True)
        return (s, pull(one)[0]), y

    # ones, not zeros: by them, torch notices and refuses what depends on a choice of its own (an eigenvector's phase)
    cotangents = tuple(torch.ones_like(value) for value in values)
    _, pull, y = _pullback(pulled_back, cotangents, has_aux=True)
    yield y
    yield pull((one,) if order == 1 else (one, zero))[0]
    if order == 2:
        yield pull((zero, one))[0]


# ------------------------------------------------------------------ functions in torch functions with all derivatives


def _hermitian(matrix: Tensor, upper: bool = False) -> Tensor:
    """The symmetric matrix [..., n, n] that a routine reads from one triangle."""
    half = matrix.triu(1) if upper else matrix.tril(-1)
    return half + half.mH + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).real)


def _triangle(matrix: Tensor, upper: bool = False) -> Tensor:
    return matrix.triu() if upper else matrix.tril()


def _eigen(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda A, UPLO="L": function(_hermitian(A, UPLO.upper() == "U"), UPLO=UPLO)


def _pinv(A: Tensor, *args: Any, hermitian: bool = False, **kwargs: Any) -> Tensor:
    return torch.linalg.pinv(_hermitian(A) if hermitian else A, *args, hermitian=hermitian, **kwargs)


def _cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    if input.is_complex():
        raise TaylorError("no Taylor rule for cholesky_inverse of complex numbers; use torch.linalg.inv")
    return torch.cholesky_inverse(_triangle(input, upper), upper)


def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """The residuals as well, which torch does not differentiate."""
    result = torch.linalg.lstsq(A, B, rcond, driver=driver)
    residuals = result.residuals
    if residuals.numel():
        is_vector = B.dim() < A.dim()
        fitted = A @ (result.solution.unsqueeze(-1) if is_vector else result.solution)
        difference = (fitted.squeeze(-1) if is_vector else fitted) - B
        residuals = difference.abs().square().sum(-1 if is_vector else -2)
    return type(result)((result.solution, residuals, result.rank, result.singular_values))


def _svd(A: Tensor, full_matrices: bool = True, *, driver: str | None = None) -> Any:
    if full_matrices and A.shape[-1] != A.shape[-2]:
        raise TaylorError("linalg_svd with full_matrices=True cannot be propagated; use full_matrices=False")
    return torch.linalg.svd(A, full_matrices, driver=driver)


def _old_svd(input: Tensor, some: bool = True, compute_uv: bool = True) -> Any:
    if not some and input.shape[-1] != input.shape[-2]:
        raise TaylorError("svd with some=False cannot be propagated; use some=True")
    return torch.svd(input, some, compute_uv)


def _qr(A: Tensor, mode: str = "reduced") -> Any:
    """R alone needs Q for its derivatives."""
    result = torch.linalg.qr(A, "reduced" if mode == "r" else mode)
    return type(result)((A.new_empty(0), result.R)) if mode == "r" else result


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """x1 [..., P, M], x2 [..., R, M] -> [..., P, R]."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return torch.linalg.vector_norm(input[first] - input[second], p, dim=-1)


def _grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    if input.dim() != 4:
        raise TaylorError("no Taylor rule for grid_sample of volumes; add one with asvit_fast.taylor.register_rule")
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return grid_sampler_2d(input, grid, modes.index(mode), paddings.index(padding_mode), bool(align_corners))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _gumbel_softmax(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("hard", args[1] if len(args) > 1 else False):
        raise TaylorError(f"gumbel_softmax with hard=True cannot be propagated: {STEPS}")
    return F.gumbel_softmax(logits, *args, **kwargs)


def _standardized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 0 and variance 1 over ``dims``; the mean and 1 / the deviation, dims kept."""
    x = x.contiguous()  # as the result is
    mean = x.mean(dims, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps)
    return (x - mean) * rstd, mean, rstd


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _native_layer_norm(input: Tensor, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    y, mean, rstd = _standardized(input, list(range(-len(normalized_shape), 0)), eps)
    return _scaled(y, weight, bias), mean, rstd


def _native_group_norm(
    input: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, ...]:
    y, mean, rstd = _standardized(input.reshape(N, group, C // group * HxW), [-1], eps)
    shape = [-1] + [1] * (input.dim() - 2)
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _scaled(y.reshape(input.shape), weight, bias), mean.squeeze(-1), rstd.squeeze(-1)


def _native_batch_norm(input: Tensor, weight: Any, bias: Any, *rest: Any) -> tuple[Tensor, ...]:
    *running, training, _, eps = rest
    shape = [-1] + [1] * (input.dim() - 2)
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    if training and running and running[0] is not None:
        raise TaylorError("batch_norm would change its running statistics; call model.eval() first")
    if training:
        y, mean, rstd = _standardized(input, [d for d in range(input.dim()) if d != 1], eps)
        return _scaled(y, weight, bias), mean.flatten(), rstd.flatten()
    mean, var = (statistic.reshape(shape) for statistic in running)
    none = input.new_zeros(0)
    return _scaled((input - mean) * torch.rsqrt(var + eps), weight, bias), none, none


_ELEMENTARY: dict[str, Callable[..., Any]] = {
    "cholesky": lambda input, upper=False: torch.linalg.cholesky(_hermitian(input, upper), upper=upper),
    "linalg_cholesky": lambda input, upper=False: torch.linalg.cholesky(_hermitian(input, upper), upper=upper),
    "linalg_cholesky_ex": lambda input, upper=False, check_errors=False: torch.linalg.cholesky_ex(
        _hermitian(input, upper), upper=upper, check_errors=check_errors
    ),
    "cholesky_inverse": _cholesky_inverse,
    "cholesky_solve": lambda input, input2, upper=False: torch.cholesky_solve(input, _triangle(input2, upper), upper),
    "linalg_eigh": _eigen(torch.linalg.eigh),
    "linalg_eigvalsh": _eigen(torch.linalg.eigvalsh),
    "linalg_matrix_sqrth": lambda A, **kwargs: torch.linalg.matrix_sqrth(_hermitian(A), **kwargs),
    "linalg_lstsq": _lstsq,
    "linalg_qr": _qr,
    "linalg_svd": _svd,
    "svd": _old_svd,
    "linalg_pinv": _pinv,
    "cdist": _cdist,
    "pdist": _pdist,
    "grid_sample": _grid_sample,
    "_weight_norm": _weight_norm,  # torch's second derivative of it is wrong
    "_weight_norm_interface": lambda v, g, dim=0: (_weight_norm(v, g, dim), torch.norm_except_dim(v, 2, dim)),
    "gumbel_softmax": _gumbel_softmax,
    "native_layer_norm": _native_layer_norm,
    "native_group_norm": _native_group_norm,
    "native_batch_norm": _native_batch_norm,
    "_native_batch_norm_legit": _native_batch_norm,
}
