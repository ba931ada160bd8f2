"""Overlapping patch merging: K x K neighbourhoods of tokens, stride 2, LayerNorm over the neighbourhood, Linear.

The fused paths never hold all neighbourhoods: the CPU's works on blocks of them that its cache holds, the GPU's reads
them from the map inside of the matrix product. Backward passes find them again from the map and two numbers per
neighbourhood.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension, backends
from ..errors import InputError
from .checks import check_device, check_devices, check_eps, check_floats, check_integer, check_operand
from .decomposition import register_decomposition
from .optional import double_backward, gradients, present
from .transforms import autocast_dtype, transform_active


def merge_padding(size: int, kernel: int, stride: int) -> list[int]:
    """Zeros (before, after) along one axis such that the output has ceil(size / stride) tokens.

    For even grids these are the authors' (kernel - 2) // 2 and (kernel - 1) // 2; an odd grid gets one more at the end.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before = max(kernel - stride, 0) // 2
    return [before, total - before]


def _pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """[B, H, W, C] -> [B, C, H', W']."""
    top_bottom, left_right = merge_padding(x.shape[1], kernel, stride), merge_padding(x.shape[2], kernel, stride)
    return F.pad(x.permute(0, 3, 1, 2), left_right + top_bottom)


def unfold_order(parameter: Tensor, kernel: int) -> Tensor:
    """[..., C*K*K], features ordered (column, row, channel), to the order of nn.Unfold, (channel, row, column)."""
    by_axis = parameter.unflatten(-1, (kernel, kernel, parameter.shape[-1] // (kernel * kernel)))
    return by_axis.transpose(-3, -1).flatten(-3)


def patch_merge_reference(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    order: str = "unfold",
) -> Tensor:
    """``patch_merge`` in elementary operations, the neighbourhoods materialised when they are normalised."""
    channels = x.shape[3]
    size = [-(-x.shape[1] // stride), -(-x.shape[2] // stride)]
    if order == "timm":
        weight = unfold_order(weight, kernel)
        norm_weight = None if norm_weight is None else unfold_order(norm_weight, kernel)
        norm_bias = None if norm_bias is None else unfold_order(norm_bias, kernel)
    bias = None if bias is None else bias.to(weight.dtype)
    x = _pad(x, kernel, stride)  # [B, C, H', W']
    if norm_weight is None:  # nothing between unfolding and projection: a convolution
        kernels = weight.reshape(weight.shape[0], channels, kernel, kernel)
        return F.conv2d(x.to(weight.dtype), kernels, bias, stride=stride).permute(0, 2, 3, 1)
    patches = F.unfold(x, kernel, stride=stride).transpose(1, 2)  # [B, Ho*Wo, C*K*K]
    wide = torch.promote_types(patches.dtype, norm_weight.dtype)
    shift = None if norm_bias is None else norm_bias.to(wide)
    patches = F.layer_norm(patches.to(wide), (patches.shape[2],), norm_weight.to(wide), shift, eps)
    return F.linear(patches.to(weight.dtype), weight, bias).unflatten(1, size)


# --------------------------------------------------------------------------- fused op

Result = tuple[Tensor, Tensor]
# x, weight, norm_weight, norm_bias, bias
Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Settings(NamedTuple):
    """What is not a tensor."""

    kernel: int
    stride: int
    eps: float
    channels_last: bool


def _padding(x: Tensor, kernel: int, stride: int) -> list[int]:
    """Zeros above, below, to the left, to the right."""
    return merge_padding(x.shape[1], kernel, stride) + merge_padding(x.shape[2], kernel, stride)


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> list[int]:
    return [x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), weight.shape[0]]


def _working_type(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _compiled(operands: Operands, settings: Settings) -> Result:
    """C++: csrc/patch_merge.cpp."""
    _extension.extension()
    x, weight, *vectors = operands
    kernel, stride, eps, channels_last = settings
    padding = _padding(x, kernel, stride)
    return torch.ops.asvit_fast_C.patch_merge(x, weight, kernel, stride, *vectors, eps, channels_last, padding)


def _reference(operands: Sequence[Any], settings: Settings) -> Tensor:
    x, weight, norm_weight, norm_bias, bias = operands
    kernel, stride, eps, channels_last = settings
    order = "timm" if channels_last else "unfold"
    return patch_merge_reference(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order)


def _elementary(operands: Operands, settings: Settings) -> Result:
    """The reference, with the statistics that fused backward passes need."""
    x, weight, *_ = operands
    output = _reference(operands, settings).contiguous()
    patches = F.unfold(_pad(x, settings.kernel, settings.stride), settings.kernel, stride=settings.stride)
    variance, mean = torch.var_mean(patches.to(_working_type(x, weight)), 1, correction=0)  # [B, Ho*Wo]
    statistics = torch.stack((mean, torch.rsqrt(variance + settings.eps)))
    return output, statistics.unflatten(2, _output_shape(x, weight, settings.stride)[1:3])


def _check_triton(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"patch_merge: the triton backend computes in float32, got {tensor.dtype}: use reference")


def _triton(operands: Operands, settings: Settings) -> Result:
    """kernels/patch_merge.py."""
    from asvit_fast.kernels.patch_merge import patch_merge

    x, weight, *vectors = operands
    kernel, stride, eps, channels_last = settings
    _check_triton(x, weight)
    return patch_merge(x, weight, kernel, stride, *vectors, eps, channels_last, _padding(x, kernel, stride))


backends.declare("patch_merge", triton=_triton, cpu=_compiled, reference=_elementary)


@torch.library.custom_op("asvit_fast::patch_merge", mutates_args=())
def _patch_merge(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels_last: bool,
) -> Result:
    """The output [B, Ho, Wo, Cout] in the weight's type, and [2, B, Ho, Wo]: mean and 1 / standard deviation of every
    neighbourhood."""
    run = backends.select("patch_merge", x.device)
    return run((x, weight, norm_weight, norm_bias, bias), Settings(kernel, stride, eps, channels_last))


@_patch_merge.register_fake
def _fake(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last) -> Result:
    check_devices("patch_merge", x, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias)
    shape = _output_shape(x, weight, stride)
    return weight.new_empty(shape), x.new_empty([2, *shape[:3]], dtype=_working_type(x, weight))


def _decomposition(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last) -> Result:
    operands = (x, weight, norm_weight, norm_bias, bias)
    output = _reference(operands, Settings(kernel, stride, eps, channels_last))
    return output.contiguous(), _fake(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last)[1]


register_decomposition(_patch_merge, _decomposition)


# --------------------------------------------------------------------------- autograd


def _fused_backward(
    implementation: Callable[..., Result], gradient: Tensor, operands: Operands, settings: Settings, statistics: Tensor,
    to_input: bool, to_parameters: bool,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Gradients of the operands; what was not asked for may be anything."""
    x, weight, norm_weight, norm_bias, bias = operands
    kernel, stride, eps, channels_last = settings
    padding = _padding(x, kernel, stride)
    if implementation is _triton:
        from asvit_fast.kernels.patch_merge_backward import patch_merge_backward

        _check_triton(x, weight)
        return patch_merge_backward(
            gradient, x, statistics, weight, kernel, stride, norm_weight, norm_bias, bias, channels_last, padding,
            to_input, to_parameters,
        )  # fmt: skip
    _extension.extension()
    return torch.ops.asvit_fast_C.patch_merge_backward(
        gradient, x, weight, statistics, kernel, stride, norm_weight, norm_bias, eps, channels_last, padding, to_input,
        to_parameters,
    )  # fmt: skip


def _asked(operands: Sequence[Tensor | None], to_input: bool, to_parameters: bool) -> list[bool]:
    """For each operand, whether its gradient is returned."""
    return [to_input, *(to_parameters and x is not None for x in operands[1:])]


@torch.library.custom_op("asvit_fast::patch_merge_backward", mutates_args=())
def _patch_merge_backward(
    gradient: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels_last: bool,
    to_input: bool,
    to_parameters: bool,
) -> list[Tensor]:
    """Gradients of x, weight, norm_weight, norm_bias and bias (empty unless asked for); sums in an order that only
    shapes decide."""
    operands = (x, weight, norm_weight, norm_bias, bias)
    settings = Settings(kernel, stride, eps, channels_last)
    implementation = backends.select("patch_merge", x.device)
    if implementation is _elementary:
        found: Sequence[Tensor | None] = gradients(lambda given: _reference(given, settings), gradient, operands)
    else:
        found = _fused_backward(implementation, gradient, operands, settings, statistics, to_input, to_parameters)
    return [
        new.to(old.dtype).contiguous() if wanted and new is not None and old is not None else x.new_empty(0)
        for wanted, new, old in zip(_asked(operands, to_input, to_parameters), found, operands, strict=True)
    ]


@_patch_merge_backward.register_fake
def _fake_backward(
    gradient, x, statistics, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last, to_input,
    to_parameters,
) -> list[Tensor]:  # fmt: skip
    check_devices("patch_merge_backward", x, gradient=gradient, statistics=statistics, weight=weight, bias=bias)
    check_devices("patch_merge_backward", x, norm_weight=norm_weight, norm_bias=norm_bias)
    operands = (x, weight, norm_weight, norm_bias, bias)
    return [
        old.new_empty(old.shape) if wanted else x.new_empty(0)
        for wanted, old in zip(_asked(operands, to_input, to_parameters), operands, strict=True)
    ]


def _setup_context(ctx, inputs, output: Result) -> None:
    x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last = inputs
    ctx.settings = Settings(kernel, stride, eps, channels_last)
    ctx.save_for_backward(output[1], x, weight, norm_weight, norm_bias, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _: Tensor | None):
    if gradient is None:
        return (None,) * 9
    kernel, stride, eps, channels_last = ctx.settings
    statistics, x, weight, *vectors = ctx.saved_tensors
    needs_x, needs_weight, _, _, *needs, _, _ = ctx.needs_input_grad
    found = _patch_merge_backward(
        gradient, x, statistics, weight, kernel, stride, *vectors, eps, channels_last, needs_x,
        needs_weight or any(needs),
    )  # fmt: skip
    wanted = [needs_x, needs_weight, *needs]
    to_x, to_weight, *to_vectors = (new if want else None for new, want in zip(found, wanted, strict=True))
    return to_x, to_weight, None, None, *to_vectors, None, None


_patch_merge.register_autograd(_backward, setup_context=_setup_context)


def _setup_double(ctx, inputs, output: list[Tensor]) -> None:
    gradient, x, _, weight, kernel, stride, *vectors, eps, channels_last, to_input, to_parameters = inputs
    operands = (x, weight, *vectors)
    ctx.settings, ctx.there = Settings(kernel, stride, eps, channels_last), [x is not None for x in operands]
    ctx.asked = _asked(operands, to_input, to_parameters)
    ctx.save_for_backward(gradient, *present(operands))


def _double_backward(ctx, cotangents: list[Tensor | None]):
    """In elementary operations, so that it can be differentiated again."""
    to_gradient, (to_x, to_weight, *to_vectors) = double_backward(
        lambda given: _reference(given, ctx.settings), ctx.there, ctx.asked, ctx.saved_tensors, cotangents
    )
    return to_gradient, to_x, None, to_weight, None, None, *to_vectors, None, None, None, None


_patch_merge_backward.register_autograd(_double_backward, setup_context=_setup_double)

# --------------------------------------------------------------------------- public


def _check(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias: Tensor | None,
    eps: float,
    order: str,
) -> int:
    """InputError for arguments that do not fit. Returns a stride that does the same and is not larger than the map."""
    op = "patch_merge"
    check_integer(op, "kernel", kernel, 1)
    check_integer(op, "stride", stride, 1)
    check_eps(op, eps)
    check_floats(op, "x", x)
    check_floats(op, "weight", weight)
    check_device(op, "weight", weight, x)
    fits = x.dim() == 4 and weight.dim() == 2 and x.shape[3] > 0 and weight.shape[1] == x.shape[3] * kernel * kernel
    if not fits:
        raise InputError(
            f"patch_merge: x must be [B, H, W, C] and weight [Cout, C*{kernel}*{kernel}], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise InputError(f"patch_merge: x must have tokens, got {list(x.shape)}")
    if norm_weight is None and norm_bias is not None:
        raise InputError("patch_merge: norm_bias without norm_weight, which is what asks for a LayerNorm")
    check_operand(op, "norm_weight", norm_weight, [weight.shape[1]], x)
    check_operand(op, "norm_bias", norm_bias, [weight.shape[1]], x)
    check_operand(op, "bias", bias, [weight.shape[0]], x)
    if order != "unfold" and order != "timm":
        raise InputError(f"patch_merge: order must be 'unfold' or 'timm', got '{order}'")
    return min(stride, max(kernel, x.shape[1], x.shape[2]))


def patch_merge(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    order: str = "unfold",
) -> Tensor:
    """Merge K x K neighbourhoods of tokens: x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), Cout].

    Zero padding at (kernel - 2) // 2 before and (kernel - 1) // 2 after (stride 2); an odd grid gets one more row and
    column at the end. Padding counts in the LayerNorm statistics. Source: As-ViT (arXiv 2202.11921), section 3.1; with
    ``kernel`` 2 and ``order`` "timm", Swin (arXiv 2103.14030), section 3.1.

    Args:
        x: [B, H, W, C], float32, float64, float16 or bfloat16; the output has the weight's, or autocast's.
        weight: [Cout, C*K*K], input features ordered as ``order`` says; bias: [Cout] or None.
        kernel, stride: tokens.
        norm_weight, norm_bias: [C*K*K], in the same order; without ``norm_weight`` there is no LayerNorm.
        eps: LayerNorm's epsilon.
        order: "unfold", features ordered (channel, row, column) as by nn.Unfold; "timm", (column, row, channel) as by
            the PatchMerging of timm's and torchvision's Swin.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, naming the value.

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels (elementary operations in
    float64), none of which holds all neighbourhoods. Without LayerNorm it is torch's convolution.
    """
    if not torch.jit.is_scripting():
        operands = (x, weight, norm_weight, norm_bias, bias)
        if has_torch_function(operands):
            return handle_torch_function(
                patch_merge, operands, x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order
            )
    stride = _check(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order)
    elementary = norm_weight is None or x.numel() == 0 or weight.numel() == 0
    if not torch.jit.is_scripting():
        low = autocast_dtype(x.device.type)
        if low is not None and weight.dtype != torch.float64:
            weight = weight.to(low)
        elementary = elementary or transform_active() or x.device.type not in ("cpu", "cuda", "meta")
        if backends.forced_backend() is not None:
            elementary = elementary or backends.select("patch_merge", x.device) is _elementary
        elif x.device.type == "cuda" and torch.float64 in (x.dtype, weight.dtype):
            elementary = True
        if not elementary and norm_weight is not None:
            channels_last = order == "timm"
            return _patch_merge(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, channels_last)[0]
    return patch_merge_reference(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order)
