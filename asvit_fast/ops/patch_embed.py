"""Overlapping, dilated patch embedding: image -> normalised tokens, channels last.

The fused op's backward pass computes the convolution again where that costs less than writing its values and reading
them back: always on a GPU, for small patches on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension, backends
from ..errors import InputError
from .checks import check_device, check_devices, check_eps, check_floats, check_integer, check_length, check_operand
from .decomposition import register_decomposition
from .optional import double_backward, gradients, present, restored
from .transforms import autocast_dtype, sizes, transform_active


def patch_embed_reference(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    padding: tuple[int, int, int, int],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``patch_embed`` in elementary operations."""
    image = F.pad(image, (padding[0], padding[1], padding[2], padding[3]))
    bias = None if bias is None else bias.to(weight.dtype)
    tokens = F.conv2d(image, weight, bias, stride=stride, dilation=dilation).permute(0, 2, 3, 1)  # [B, Ho, Wo, C]
    if norm_weight is None:
        return tokens
    wide = torch.promote_types(tokens.dtype, norm_weight.dtype)
    norm_bias = None if norm_bias is None else norm_bias.to(wide)
    normalised = F.layer_norm(tokens.to(wide), (tokens.shape[3],), norm_weight.to(wide), norm_bias, eps)
    return normalised if torch.is_autocast_enabled() else normalised.to(tokens.dtype)  # a GPU's autocast: float32


def _check(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    padding: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[int, int]:
    """InputError for arguments that do not fit. Returns a stride and a dilation that do the same and are not larger
    than the image."""
    op = "patch_embed"
    check_integer(op, "stride", stride, 1)
    check_integer(op, "dilation", dilation, 1)
    check_eps(op, eps)
    for zeros in padding:
        check_integer(op, "padding", zeros, 0)
    check_floats(op, "image", image)
    check_floats(op, "weight", weight)
    check_device(op, "weight", weight, image)
    if image.dim() != 4 or weight.dim() != 4 or image.shape[1] != weight.shape[1]:
        raise InputError(
            f"patch_embed: image must be [B, Cin, H, W] and weight [C, Cin, K, K] with the same Cin, "
            f"got {list(image.shape)} and {list(weight.shape)}"
        )
    kernel = weight.shape[2]
    if weight.shape[3] != kernel or weight.numel() == 0:
        shape = list(weight.shape)
        raise InputError(f"patch_embed: weight must be [C, Cin, K, K] with square patches, none of them 0, got {shape}")
    if norm_weight is None and norm_bias is not None:
        raise InputError("patch_embed: norm_bias without norm_weight, which is what asks for a LayerNorm")
    check_operand(op, "bias", bias, [weight.shape[0]], image)
    check_operand(op, "norm_weight", norm_weight, [weight.shape[0]], image)
    check_operand(op, "norm_bias", norm_bias, [weight.shape[0]], image)
    span = dilation * (kernel - 1) + 1
    height, width = image.shape[2] + padding[2] + padding[3], image.shape[3] + padding[0] + padding[1]
    if height < span or width < span:
        raise InputError(
            f"patch_embed: patches of {span} pixels (K {kernel}, dilation {dilation}) do not fit an image of "
            f"{height} x {width} pixels with its padding"
        )
    if max(height, width) > 0x7FFFFFFF:
        raise InputError(
            f"patch_embed: padding {padding} makes an image of {height} x {width} pixels, which is too large"
        )
    return min(stride, max(height, width)), dilation if kernel > 1 else 1


# --------------------------------------------------------------------------- fused op

MAXIMUM_CHANNELS = 512  # that a Triton program normalises in its registers
KEPT_FROM = 96  # pixels of a patch in all channels, from which a CPU keeps the convolution's values
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Result = tuple[Tensor, Tensor]
# image, weight, bias, norm_weight, norm_bias
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Settings(NamedTuple):
    """What is not a tensor. `products`: what a GPU rounds pixels and weights to before it multiplies them (sums are
    float32); `dtype`: of the output."""

    stride: int
    dilation: int
    padding: list[int]
    eps: float
    products: torch.dtype
    dtype: torch.dtype


def _working_type(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _compiled(operands: Operands, settings: Settings, keep: bool) -> Result:
    """C++: csrc/patch_embed.cpp."""
    _extension.extension()
    stride, dilation, padding, eps, _, dtype = settings
    return torch.ops.asvit_fast_C.patch_embed(*operands, stride, dilation, padding, eps, dtype, keep)


def _reference(operands: Sequence[Any], settings: Settings) -> Tensor:
    """The reference in the widest of the operands' types."""
    wide = functools.reduce(torch.promote_types, (x.dtype for x in operands if x is not None))
    image, weight = operands[0].to(wide), operands[1].to(wide)
    bias, norm_weight, norm_bias = (None if x is None else x.to(wide) for x in operands[2:])
    stride, dilation, padding, eps, _, dtype = settings
    zeros = (padding[0], padding[1], padding[2], padding[3])
    return patch_embed_reference(image, weight, bias, stride, dilation, zeros, norm_weight, norm_bias, eps).to(dtype)


def _elementary(operands: Operands, settings: Settings, keep: bool) -> Result:
    """The reference; what is to be kept is computed again, as whoever asked expects to get it."""
    tokens = _reference(operands, settings).contiguous()
    if not keep:
        return tokens, tokens.new_empty(0)
    unrounded = settings._replace(dtype=_working_type(operands[0]))
    return tokens, _reference((*operands[:3], None, None), unrounded).contiguous()


def _check_triton(operands: Operands) -> None:
    image, weight = operands[:2]
    if image.dtype == torch.float64:
        raise InputError("patch_embed: the triton backend computes in float32, got torch.float64: use reference")
    if weight.shape[0] > MAXIMUM_CHANNELS:
        raise InputError(
            f"patch_embed: the triton backend has at most {MAXIMUM_CHANNELS} channels, got {weight.shape[0]}: "
            "use reference"
        )


def _triton(operands: Operands, settings: Settings, keep: bool) -> Result:
    """kernels/patch_embed.py; keeps nothing."""
    from asvit_fast.kernels.patch_embed import patch_embed

    _check_triton(operands)
    tokens = patch_embed(*operands, *settings)
    return tokens, tokens.new_empty(0)


backends.declare("patch_embed", triton=_triton, cpu=_compiled, reference=_elementary)


@torch.library.custom_op("asvit_fast::patch_embed", mutates_args=())
def _patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stride: int,
    dilation: int,
    padding: list[int],
    eps: float,
    products: torch.dtype,
    dtype: torch.dtype,
    keep: bool,
) -> Result:
    """Tokens [B, Ho, Wo, C], and if a backward pass that needs them comes the convolution's values (else empty)."""
    settings = Settings(stride, dilation, padding, eps, products, dtype)
    run = backends.select("patch_embed", image.device)
    return run((image, weight, bias, norm_weight, norm_bias), settings, keep)


def _output_shape(image: Tensor, weight: Tensor, stride: int, dilation: int, padding: list[int]) -> list[int]:
    span = dilation * (weight.shape[2] - 1) + 1
    rows = (image.shape[2] + padding[2] + padding[3] - span) // stride + 1
    columns = (image.shape[3] + padding[0] + padding[1] - span) // stride + 1
    return [image.shape[0], rows, columns, weight.shape[0]]


@_patch_embed.register_fake
def _fake(image, weight, bias, norm_weight, norm_bias, stride, dilation, padding, eps, products, dtype, keep) -> Result:
    check_devices("patch_embed", image, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    shape = _output_shape(image, weight, stride, dilation, padding)
    kept = image.new_empty(shape if keep else [0], dtype=_working_type(image))
    return image.new_empty(shape, dtype=dtype), kept


def _decomposition(
    image, weight, bias, norm_weight, norm_bias, stride, dilation, padding, eps, products, dtype, keep
) -> Result:
    settings = Settings(stride, dilation, padding, eps, products, dtype)
    return _elementary((image, weight, bias, norm_weight, norm_bias), settings, keep)


register_decomposition(_patch_embed, _decomposition)


# --------------------------------------------------------------------------- autograd

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of the operands


def _image_gradient(to_values: Tensor, image: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """From gradients [B, Ho, Wo, C] of the convolution's values by torch's transposed convolution, whose result loses
    its padding: [B, Cin, H, W]."""
    batch, channels, height, width = image.shape
    left, right, top, bottom = settings.padding
    to_image = torch.nn.grad.conv2d_input(
        [batch, channels, height + top + bottom, width + left + right],
        weight.to(to_values.dtype),
        to_values.permute(0, 3, 1, 2),
        stride=settings.stride,
        dilation=settings.dilation,
    )
    return to_image[:, :, top : top + height, left : left + width].to(image.dtype, copy=True).contiguous()


def _fused_backward(
    implementation: Callable[..., Result], gradient: Tensor, operands: Operands, settings: Settings, values: Tensor,
    of_image: bool, of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the convolution's values and of the parameters, each empty unless asked for."""
    if implementation is _triton:
        from asvit_fast.kernels.patch_embed import patch_embed_backward

        _check_triton(operands)
        return patch_embed_backward(gradient, *operands, *settings[:5], of_image, of_parameters)
    _extension.extension()
    return torch.ops.asvit_fast_C.patch_embed_backward(
        gradient, *operands, *settings[:4], values, of_image, of_parameters
    )


def _elementary_backward(
    gradient: Tensor, operands: Operands, settings: Settings, of_image: bool, of_parameters: bool
) -> Gradients:
    found = gradients(lambda given: _reference(given, settings), gradient, operands)
    wanted = [of_image] + [of_parameters] * 4
    nothing = (operands[0].new_empty(0) for _ in operands)
    image, weight, bias, norm_weight, norm_bias = (
        x.clone(memory_format=torch.contiguous_format) if x is not None and want else next(nothing)
        for x, want in zip(found, wanted, strict=True)
    )
    return image, weight, bias, norm_weight, norm_bias


@torch.library.custom_op("asvit_fast::patch_embed_backward", mutates_args=())
def _patch_embed_backward(
    gradient: Tensor,
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stride: int,
    dilation: int,
    padding: list[int],
    eps: float,
    products: torch.dtype,
    dtype: torch.dtype,
    values: Tensor,
    of_image: bool,
    of_parameters: bool,
) -> Gradients:
    """Gradients of the operands, empty for those that are not there or not asked for; sums over tokens in an order that
    only shapes decide."""
    settings = Settings(stride, dilation, padding, eps, products, dtype)
    operands = (image, weight, bias, norm_weight, norm_bias)
    implementation = backends.select("patch_embed", image.device)
    if implementation is _elementary:
        return _elementary_backward(gradient, operands, settings, of_image, of_parameters)
    to_values, *parameters = _fused_backward(
        implementation, gradient, operands, settings, values, of_image, of_parameters
    )
    to_image = _image_gradient(to_values, image, weight, settings) if of_image else to_values
    return (to_image, *parameters)  # type: ignore[return-value]


@_patch_embed_backward.register_fake
def _fake_backward(
    gradient, image, weight, bias, norm_weight, norm_bias, stride, dilation, padding, eps, products, dtype, values,
    of_image, of_parameters,
) -> Gradients:  # fmt: skip
    check_devices("patch_embed_backward", image, gradient=gradient, weight=weight, values=values)
    check_devices("patch_embed_backward", image, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)

    def like(operand: Tensor | None, wanted: bool) -> Tensor:
        return operand.new_empty(operand.shape) if operand is not None and wanted else image.new_empty(0)

    parameters = (like(x, of_parameters) for x in (weight, bias, norm_weight, norm_bias))
    return (like(image, of_image), *parameters)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output: Result) -> None:
    operands = inputs[:5]
    ctx.settings, ctx.there = inputs[5:11], [x is not None for x in operands]
    ctx.save_for_backward(output[1], *present(operands))
    ctx.set_materialize_grads(False)


def _backward(ctx, gradient: Tensor | None, _: Tensor | None):
    if gradient is None:
        return (None,) * 12
    values, *operands = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:5]
    found = _patch_embed_backward(
        gradient, *restored(operands, ctx.there), *ctx.settings, values, wanted[0], any(wanted[1:])
    )
    returned = (x if want and there else None for x, want, there in zip(found, wanted, ctx.there, strict=True))
    return (*returned, *(None,) * 7)


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


def _setup_double(ctx, inputs, output: Gradients) -> None:
    gradient, operands = inputs[0], inputs[1:6]
    ctx.settings, (ctx.of_image, ctx.of_parameters) = Settings(*inputs[6:12]), inputs[13:]
    ctx.there = [x is not None for x in operands]
    ctx.save_for_backward(gradient, *present(operands))


def _double_backward(ctx, *cotangents: Tensor):
    """In elementary operations, so that it can be differentiated again."""
    asked = [ctx.of_image] + [ctx.of_parameters] * 4
    to_gradient, to_operands = double_backward(
        lambda given: _reference(given, ctx.settings), ctx.there, asked, ctx.saved_tensors, cotangents
    )
    return (to_gradient, *to_operands, *(None,) * 9)


_patch_embed_backward.register_autograd(_double_backward, setup_context=_setup_double)


# --------------------------------------------------------------------------- public


def _types(image: Tensor, weight: Tensor, normalised: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of products and output, as autocast chooses them for a convolution and a LayerNorm (float32 on a GPU)."""
    low = autocast_dtype(image.device.type)
    if image.dtype != torch.float64 and low is not None:
        return low, torch.float32 if normalised and image.device.type == "cuda" else low
    if image.dtype != weight.dtype:
        raise InputError(f"patch_embed: image is {image.dtype} and weight {weight.dtype}: convert one of them")
    return image.dtype, image.dtype


@torch.compiler.assume_constant_result  # said while tracing
def _say_too_wide() -> None:
    backends.notify_once(
        "patch_embed channels",
        f"patch_embed of more than {MAXIMUM_CHANNELS} channels runs in elementary operations on a GPU",
    )


def _fuses(image: Tensor, weight: Tensor) -> bool:
    """Whether the fused op is for this call."""
    if image.numel() == 0 or weight.numel() == 0 or image.dtype not in _FLOATS or transform_active():
        return False
    if backends.forced_backend() is not None:
        return backends.select("patch_embed", image.device) is not _elementary
    if image.device.type == "cuda":
        if weight.shape[0] > MAXIMUM_CHANNELS:
            _say_too_wide()
            return False
        return image.dtype != torch.float64
    return image.device.type in ("cpu", "meta")


def _keeps(operands: Operands) -> bool:
    """Whether a backward pass on a CPU will want the convolution's values."""
    weight = operands[1]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in present(operands))
    differentiated = differentiated and not torch.jit.is_tracing()  # a trace is of no one mode
    return differentiated and weight.device.type == "cpu" and weight[0].numel() >= KEPT_FROM


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    padding: tuple[int, int, int, int],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Convolution, then LayerNorm over the channels: image [B, Cin, H, W] -> [B, Ho, Wo, C].

    Args:
        image: [B, Cin, H, W], of any layout; float32, float64, float16 or bfloat16.
        weight: [C, Cin, K, K], of the image's dtype except under autocast; bias: [C] of any floating dtype, or None.
        stride, dilation: pixels; with token reduction the dilation keeps a patch about as wide as its stride
            (As-ViT, arXiv 2202.11921, section 3.4).
        padding: zeros at (left, right, top, bottom), in pixels.
        norm_weight, norm_bias: [C], of any floating dtype; without ``norm_weight`` there is no LayerNorm.
        eps: LayerNorm's epsilon.

    Raises:
        InputError: shapes, dtypes, devices or numbers that do not fit, naming the value.

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels (elementary operations in
    float64 and beyond 512 channels). The gradient of the image, where it is needed, is torch's transposed convolution.
    """
    if not torch.jit.is_scripting():
        operands = (image, weight, bias, norm_weight, norm_bias)
        if has_torch_function(operands):
            return handle_torch_function(
                patch_embed, operands, image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps
            )
        check_length("patch_embed", "padding", padding, 4)
    zeros = [padding[0], padding[1], padding[2], padding[3]]
    if not torch.jit.is_scripting():
        zeros = sizes(zeros)
    stride, dilation = _check(image, weight, bias, stride, dilation, zeros, norm_weight, norm_bias, eps)
    if not torch.jit.is_scripting():
        products, dtype = _types(image, weight, norm_weight is not None)
        if _fuses(image, weight):
            return _patch_embed(
                image, weight, bias, norm_weight, norm_bias, stride, dilation, zeros, eps, products, dtype,
                norm_weight is not None and _keeps((image, weight, bias, norm_weight, norm_bias)),
            )[0]  # fmt: skip
    return patch_embed_reference(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps)
