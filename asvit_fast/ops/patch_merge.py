"""Overlapping patch merging: K x K neighbourhoods of tokens, stride 2, LayerNorm over the neighbourhood, Linear.

The fused paths never hold all neighbourhoods: the CPU's works on blocks of them that its cache holds, the GPU's reads
them from the map inside of the matrix product. Backward passes find them again from the map and two numbers per
neighbourhood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension
from ..errors import InputError
from .checks import check_device, check_eps, check_floats, check_integer, check_operand, once_per_arguments
from .fused_op import FusedOp, Gradients, Operands, Result, Saved, no_float64
from .transforms import autocast_dtype


def merge_padding(size: int, kernel: int, stride: int) -> list[int]:
    """Zeros (before, after) along one axis such that the output has ceil(size / stride) tokens.

    For even grids these are the authors' (kernel - 2) // 2 and (kernel - 1) // 2; an odd grid gets one more at the end.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before = max(kernel - stride, 0) // 2
    return [before, total - before]


def pad_for_merging(x: Tensor, kernel: int, stride: int) -> Tensor:
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
    """``patch_merge`` in plain PyTorch operations, the neighbourhoods materialised when they are normalised."""
    channels = x.shape[3]
    size = [-(-x.shape[1] // stride), -(-x.shape[2] // stride)]
    if order == "timm":
        weight = unfold_order(weight, kernel)
        norm_weight = None if norm_weight is None else unfold_order(norm_weight, kernel)
        norm_bias = None if norm_bias is None else unfold_order(norm_bias, kernel)
    bias = None if bias is None else bias.to(weight.dtype)
    x = pad_for_merging(x, kernel, stride)  # [B, C, H', W']
    if norm_weight is None:  # nothing between unfolding and projection: a convolution
        kernels = weight.reshape(weight.shape[0], channels, kernel, kernel)
        return F.conv2d(x.to(weight.dtype), kernels, bias, stride=stride).permute(0, 2, 3, 1)
    patches = F.unfold(x, kernel, stride=stride).transpose(1, 2)  # [B, Ho*Wo, C*K*K]
    wide = torch.promote_types(patches.dtype, norm_weight.dtype)
    shift = None if norm_bias is None else norm_bias.to(wide)
    patches = F.layer_norm(patches.to(wide), (patches.shape[2],), norm_weight.to(wide), shift, eps)
    return F.linear(patches.to(weight.dtype), weight, bias).unflatten(1, size)


# --------------------------------------------------------------------------- fused op


@dataclass(frozen=True)
class PatchMergeConfig:
    """Arguments that are not tensors. ``channels_last``: features ordered (column, row, channel)."""

    kernel: int
    stride: int
    eps: float
    channels_last: bool


def _reference(operands: Operands, config: PatchMergeConfig) -> Tensor:
    x, weight, norm_weight, norm_bias, bias = operands
    return patch_merge_reference(
        x, weight, config.kernel, config.stride, norm_weight, norm_bias, bias, config.eps, _order(config)
    )


def _order(config: PatchMergeConfig) -> str:
    return "timm" if config.channels_last else "unfold"


def _padding(x: Tensor, config: PatchMergeConfig) -> list[int]:
    """Zeros above, below, to the left, to the right."""
    rows, columns = (merge_padding(side, config.kernel, config.stride) for side in x.shape[1:3])
    return rows + columns


def _output_shape(x: Tensor, weight: Tensor, stride: int) -> list[int]:
    return [x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), weight.shape[0]]


def _working_type(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _statistics(operands: Operands, config: PatchMergeConfig) -> Tensor:
    """[2, B, Ho, Wo]: mean and 1 / standard deviation of every neighbourhood."""
    x, weight = operands[:2]
    patches = F.unfold(pad_for_merging(x, config.kernel, config.stride), config.kernel, stride=config.stride)
    variance, mean = torch.var_mean(patches.to(_working_type(x, weight)), 1, correction=0)  # [B, Ho*Wo]
    statistics = torch.stack((mean, torch.rsqrt(variance + config.eps)))
    return statistics.unflatten(2, _output_shape(x, weight, config.stride)[1:3])


def _fake(operands: Operands, config: PatchMergeConfig) -> Result:
    x, weight = operands[:2]
    shape = _output_shape(x, weight, config.stride)
    return weight.new_empty(shape), x.new_empty([2, *shape[:3]], dtype=_working_type(x, weight))


def _compiled(operands: Operands, config: PatchMergeConfig) -> Result:
    """C++: csrc/patch_merge.cpp."""
    _extension.extension()
    x, weight, *vectors = operands
    return torch.ops.asvit_fast_C.patch_merge(
        x, weight, config.kernel, config.stride, *vectors, config.eps, config.channels_last, _padding(x, config)
    )


def _compiled_backward(
    gradient: Tensor, operands: Operands, config: PatchMergeConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    _extension.extension()
    x, weight, norm_weight, norm_bias, _ = operands
    return torch.ops.asvit_fast_C.patch_merge_backward(
        gradient, x, weight, result[1], config.kernel, config.stride, norm_weight, norm_bias, config.eps,
        config.channels_last, _padding(x, config), needs_grad[0], any(needs_grad[1:]),
    )  # fmt: skip


def _triton(operands: Operands, config: PatchMergeConfig) -> Result:
    """kernels/patch_merge.py."""
    from asvit_fast.kernels.patch_merge import patch_merge

    x, weight, norm_weight, norm_bias, bias = operands
    return patch_merge(
        x, weight, config.kernel, config.stride, norm_weight, norm_bias, bias, config.eps, _order(config),
        _padding(x, config),
    )  # fmt: skip


def _triton_backward(
    gradient: Tensor, operands: Operands, config: PatchMergeConfig, result: Saved, needs_grad: list[bool]
) -> Gradients:
    from asvit_fast.kernels.patch_merge_backward import patch_merge_backward

    x, weight, norm_weight, norm_bias, bias = operands
    return patch_merge_backward(
        gradient, x, result[1], weight, config.kernel, config.stride, norm_weight, norm_bias, bias, _order(config),
        _padding(x, config), needs_grad[0], any(needs_grad[1:]),
    )  # fmt: skip


PATCH_MERGE = FusedOp(
    "patch_merge",
    "x, weight, norm_weight, norm_bias?, bias?",
    PatchMergeConfig,
    reference=_reference,
    fake=_fake,
    saved=_statistics,
    forward={"triton": _triton, "cpu": _compiled},
    backward={"triton": _triton_backward, "cpu": _compiled_backward},
    can_run={"triton": lambda operands, config: no_float64(*operands[:2])},
    unread=("bias",),
)

# --------------------------------------------------------------------------- public


@once_per_arguments
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

    On a CPU one compiled kernel each for forward and backward, on a GPU Triton kernels (plain PyTorch operations in
    float64), none of which holds all neighbourhoods. Without LayerNorm it is torch's convolution.

    Examples:
        >>> import torch, asvit_fast as af
        >>> x, weight = torch.randn(2, 14, 14, 32), torch.randn(64, 32 * 4 * 4)
        >>> af.ops.patch_merge(x, weight, 4, 2, torch.ones(32 * 4 * 4), torch.zeros(32 * 4 * 4)).shape
        torch.Size([2, 7, 7, 64])
    """
    operands = (x, weight, norm_weight, norm_bias, bias)
    if has_torch_function(operands):
        return handle_torch_function(
            patch_merge, operands, x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order
        )
    stride = _check(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps, order)
    low = autocast_dtype(x.device.type)
    if low is not None and weight.dtype != torch.float64:
        weight = weight.to(low)
    if norm_weight is None:
        return patch_merge_reference(x, weight, kernel, stride, None, None, bias, eps, order)
    config = PatchMergeConfig(kernel, stride, eps, order == "timm")
    return PATCH_MERGE((x, weight, norm_weight, norm_bias, bias), config)
