"""Overlapping, dilated patch embedding: image -> normalised tokens, channels last.

The fused op's backward pass computes the convolution again where that costs less than writing its values and reading
them back: always on a GPU, for small patches on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension
from ..errors import InputError
from .checks import check_device, check_eps, check_floats, check_integer, check_length, check_operand
from .fused_op import FusedOp, Gradients, Operands, Result, Saved, no_float64
from .transforms import autocast_dtype, sizes


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
    """``patch_embed`` in plain PyTorch operations."""
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
    # min() would stay in every size that torch.compile derives for images of any size
    return stride if stride <= span else min(stride, max(height, width)), dilation if kernel > 1 else 1


# --------------------------------------------------------------------------- fused op

MAXIMUM_CHANNELS = 512  # that a Triton program normalises in its registers
SAVED_FROM = 96  # pixels of a patch in all channels, from which a CPU keeps the convolution's values


@dataclass(frozen=True)
class PatchEmbedConfig:
    """Arguments that are not tensors.

    Attributes:
        padding: zeros at left, right, top and bottom.
        compute_dtype: what a GPU rounds pixels and weights to before it multiplies them; sums are float32.
        dtype: of the output.
        save_conv_output: whether the convolution's values are saved for the backward pass, on a CPU.
    """

    stride: int
    dilation: int
    padding: list[int]
    eps: float
    compute_dtype: torch.dtype
    dtype: torch.dtype
    save_conv_output: bool


def _working_type(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _reference(operands: Operands, config: PatchEmbedConfig) -> Tensor:
    """The reference in the widest of the operands' types."""
    wide = functools.reduce(torch.promote_types, (x.dtype for x in operands if x is not None))
    image, weight = operands[0].to(wide), operands[1].to(wide)
    bias, norm_weight, norm_bias = (None if x is None else x.to(wide) for x in operands[2:])
    left, right, top, bottom = config.padding
    tokens = patch_embed_reference(
        image, weight, bias, config.stride, config.dilation, (left, right, top, bottom), norm_weight, norm_bias,
        config.eps,
    )  # fmt: skip
    return tokens.to(config.dtype)


def _values(operands: Operands, config: PatchEmbedConfig) -> Tensor:
    """[B, Ho, Wo, C]: what the convolution gives, if it is to be saved."""
    image = operands[0]
    if not config.save_conv_output:
        return image.new_empty(0, dtype=_working_type(image))
    unrounded = dataclasses.replace(config, dtype=_working_type(image))
    return _reference((*operands[:3], None, None), unrounded).contiguous()


def _fake(operands: Operands, config: PatchEmbedConfig) -> Result:
    image, weight = operands[:2]
    left, right, top, bottom = config.padding
    span = config.dilation * (weight.shape[2] - 1) + 1
    rows = (image.shape[2] + top + bottom - span) // config.stride + 1
    columns = (image.shape[3] + left + right - span) // config.stride + 1
    shape = [image.shape[0], rows, columns, weight.shape[0]]
    saved = image.new_empty(shape if config.save_conv_output else [0], dtype=_working_type(image))
    return image.new_empty(shape, dtype=config.dtype), saved


def _compiled(operands: Operands, config: PatchEmbedConfig) -> Result:
    """C++: csrc/patch_embed.cpp."""
    _extension.extension()
    return torch.ops.asvit_fast_C.patch_embed(
        *operands, config.stride, config.dilation, config.padding, config.eps, config.dtype, config.save_conv_output
    )


def _compiled_backward(
    gradient: Tensor, operands: Operands, config: PatchEmbedConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    _extension.extension()
    grad_conv, *parameters = torch.ops.asvit_fast_C.patch_embed_backward(
        gradient, *operands, config.stride, config.dilation, config.padding, config.eps, result[1], needs_grad[0],
        any(needs_grad[1:]),
    )  # fmt: skip
    return _image_gradient(grad_conv, operands, config) if needs_grad[0] else None, *parameters


def _triton(operands: Operands, config: PatchEmbedConfig) -> Result:
    """kernels/patch_embed.py; keeps nothing."""
    from asvit_fast.kernels.patch_embed import patch_embed

    image, weight, bias, norm_weight, norm_bias = operands
    tokens = patch_embed(
        image, weight, bias, norm_weight, norm_bias, config.stride, config.dilation, config.padding, config.eps,
        config.compute_dtype, config.dtype,
    )  # fmt: skip
    return tokens, image.new_empty(0, dtype=_working_type(image))


def _triton_backward(
    gradient: Tensor, operands: Operands, config: PatchEmbedConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    from asvit_fast.kernels.patch_embed_backward import patch_embed_backward

    image, weight, bias, norm_weight, norm_bias = operands
    grad_conv, *parameters = patch_embed_backward(
        gradient, image, weight, bias, norm_weight, norm_bias, config.stride, config.dilation, config.padding,
        config.eps, config.compute_dtype, any(needs_grad[1:]),
    )  # fmt: skip
    return _image_gradient(grad_conv, operands, config) if needs_grad[0] else None, *parameters


def _image_gradient(grad_conv: Tensor, operands: Operands, config: PatchEmbedConfig) -> Tensor:
    """Gradient of the image [B, Cin, H, W] from that of the convolution's output [B, Ho, Wo, C]: torch's transposed
    convolution, its padding cut off."""
    image, weight = operands[:2]
    batch, channels, height, width = image.shape
    left, right, top, bottom = config.padding
    grad_image = torch.nn.grad.conv2d_input(
        [batch, channels, height + top + bottom, width + left + right],
        weight.to(grad_conv.dtype),
        grad_conv.permute(0, 3, 1, 2),
        stride=config.stride,
        dilation=config.dilation,
    )
    return grad_image[:, :, top : top + height, left : left + width].to(image.dtype, copy=True)


def _triton_cannot(operands: Operands, config: PatchEmbedConfig) -> str | None:
    channels = operands[1].shape[0]
    if channels > MAXIMUM_CHANNELS:
        return f"it has at most {MAXIMUM_CHANNELS} channels, got {channels}"
    return no_float64(operands[0])


PATCH_EMBED = FusedOp(
    "patch_embed",
    "image, weight, bias?, norm_weight?, norm_bias?",
    PatchEmbedConfig,
    reference=_reference,
    fake=_fake,
    saved=_values,
    forward={"triton": _triton, "cpu": _compiled},
    backward={"triton": _triton_backward, "cpu": _compiled_backward},
    can_run={"triton": _triton_cannot},
)

# --------------------------------------------------------------------------- public


def _types(image: Tensor, weight: Tensor, normalised: bool) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of products and output, as autocast chooses them for a convolution and a LayerNorm (float32 on a GPU)."""
    low = autocast_dtype(image.device.type)
    if image.dtype != torch.float64 and low is not None:
        return low, torch.float32 if normalised and image.device.type == "cuda" else low
    if image.dtype != weight.dtype:
        raise InputError(f"patch_embed: image is {image.dtype} and weight {weight.dtype}: convert one of them")
    return image.dtype, image.dtype


def _saves_conv_output(operands: Operands) -> bool:
    """Whether a backward pass on a CPU will want the convolution's values."""
    weight, norm_weight = operands[1], operands[3]
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    differentiated = differentiated and not torch.jit.is_tracing()  # a trace is of no one mode
    large = weight.device.type == "cpu" and weight[0].numel() >= SAVED_FROM
    return norm_weight is not None and differentiated and large


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

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels (plain PyTorch operations in
    float64 and beyond 512 channels). The gradient of the image, where it is needed, is torch's transposed convolution.
    On a GPU float32 is multiplied as torch's own convolutions do it: in TF32 where
    ``torch.backends.cudnn.conv.fp32_precision`` is "tf32", which is torch's default (the older name:
    ``torch.backends.cudnn.allow_tf32``), with operands rounded to eleven bits; else with the accuracy of float32.

    Examples:
        >>> import torch, asvit_fast as af
        >>> image, weight = torch.randn(2, 3, 224, 224), torch.randn(96, 3, 4, 4)
        >>> y = af.ops.patch_embed(image, weight, None, 4, 1, (0, 0, 0, 0), torch.ones(96), torch.zeros(96))
        >>> y.shape  # channels last
        torch.Size([2, 56, 56, 96])
    """
    operands = (image, weight, bias, norm_weight, norm_bias)
    if has_torch_function(operands):
        return handle_torch_function(
            patch_embed, operands, image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps
        )
    check_length("patch_embed", "padding", padding, 4)
    zeros = sizes(padding)
    stride, dilation = _check(image, weight, bias, stride, dilation, zeros, norm_weight, norm_bias, eps)
    compute_dtype, dtype = _types(image, weight, norm_weight is not None)
    config = PatchEmbedConfig(stride, dilation, zeros, eps, compute_dtype, dtype, _saves_conv_output(operands))
    return PATCH_EMBED(operands, config)
