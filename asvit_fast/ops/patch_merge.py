"""Overlapping patch merging: K x K neighbourhoods of tokens, stride 2, LayerNorm over the neighbourhood, Linear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends


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


def patch_merge_reference(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``patch_merge`` in elementary operations, the neighbourhoods materialised when they are normalised."""
    channels = x.shape[3]
    size = [-(-x.shape[1] // stride), -(-x.shape[2] // stride)]
    x = _pad(x, kernel, stride)  # [B, C, H', W']
    if norm_weight is None:  # nothing between unfolding and projection: a convolution
        kernels = weight.reshape(weight.shape[0], channels, kernel, kernel)
        return F.conv2d(x, kernels, bias, stride=stride).permute(0, 2, 3, 1)
    patches = F.unfold(x, kernel, stride=stride).transpose(1, 2)  # [B, Ho*Wo, C*K*K]
    patches = F.layer_norm(patches, (patches.shape[2],), norm_weight, norm_bias, eps)
    return F.linear(patches, weight, bias).unflatten(1, size)


class _Neighbourhoods(torch.autograd.Function):
    """x [B, H, W, C] -> [B, Ho, Wo, K, K, C], and its adjoint: runs of K*C and of stride*C numbers are copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        (top, bottom), (left, right) = (merge_padding(size, kernel, stride) for size in x.shape[1:3])
        x = F.pad(x, (0, 0, left, right, top, bottom))
        patches = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # [B, Ho, Wo, C, K, K]
        return patches.permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        kernel, stride = ctx.kernel, ctx.stride
        batch, rows, columns, channels = *gradient.shape[:3], gradient.shape[5]
        reach = -(-kernel // stride) - 1  # how many steps a neighbourhood reaches beyond its own
        total = gradient.new_zeros(batch, (rows + reach) * stride, (columns + reach) * stride, channels)
        for i in range(0, kernel, stride):
            for j in range(0, kernel, stride):
                part = gradient[:, :, :, i : i + stride, j : j + stride].transpose(2, 3)  # [B, Ho, <=s, Wo, <=s, C]
                own = total[:, i : i + rows * stride, j : j + columns * stride]
                own = own.unflatten(2, (columns, stride)).unflatten(1, (rows, stride))  # [B, Ho, s, Wo, s, C]
                own[:, :, : part.shape[2], :, : part.shape[4]].add_(part)
        top, left = (merge_padding(size, kernel, stride)[0] for size in ctx.shape[1:3])
        return total[:, top : top + ctx.shape[1], left : left + ctx.shape[2]].contiguous(), None, None


def channels_last_features(parameter: Tensor, channels: int) -> Tensor:
    """[..., C*K*K] -> [..., K*K*C]."""
    return parameter.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)


def patch_merge_channels_last(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``patch_merge`` with LayerNorm, of parameters with ``channels_last_features``; reverse mode only."""
    patches = _Neighbourhoods.apply(x, kernel, stride).flatten(3)  # [B, Ho, Wo, K*K*C]
    return F.linear(F.layer_norm(patches, (patches.shape[3],), norm_weight, norm_bias, eps), weight, bias)


backends.declare("patch_merge", reference=patch_merge_reference)


def patch_merge(
    x: Tensor,
    weight: Tensor,
    kernel: int,
    stride: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Merge K x K neighbourhoods of tokens: x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), Cout].

    Zero padding at (kernel - 2) // 2 before and (kernel - 1) // 2 after (stride 2); an odd grid gets one more row and
    column at the end. Padding counts in the LayerNorm statistics. Source: As-ViT (arXiv 2202.11921), section 3.1.

    Args:
        x: [B, H, W, C].
        weight: [Cout, C*K*K], input features ordered (channel, row, column) as nn.Unfold orders them; bias: [Cout] or
            None.
        kernel, stride: tokens.
        norm_weight, norm_bias: [C*K*K]; without ``norm_weight`` there is no LayerNorm.
        eps: LayerNorm's epsilon.

    Raises:
        ValueError: shapes that do not fit, naming the value.
    """
    if not torch.jit.is_scripting():
        operands = (x, weight, norm_weight, norm_bias, bias)
        if has_torch_function(operands):
            return handle_torch_function(
                patch_merge, operands, x, weight, kernel, stride, norm_weight, norm_bias, bias, eps
            )
        if backends.forced_backend() is not None:
            implementation = backends.select("patch_merge", x.device)
            return implementation(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps)
    if x.dim() != 4 or weight.dim() != 2 or weight.shape[1] != x.shape[3] * kernel * kernel:
        raise ValueError(
            f"patch_merge: x must be [B, H, W, C] and weight [Cout, C*{kernel}*{kernel}], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    return patch_merge_reference(x, weight, kernel, stride, norm_weight, norm_bias, bias, eps)
