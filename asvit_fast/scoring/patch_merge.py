"""Patch merging for per-sample gradients: its neighbourhoods materialised, features channels last."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.patch_merge import merge_padding


def neighbourhoods(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Maps x [B, H, W, ..., C] -> [B, Ho, Wo, ..., K, K, C], contiguous: a copy, in runs of C numbers or more."""
    (top, bottom), (left, right) = (merge_padding(size, kernel, stride) for size in x.shape[1:3])
    if max(top, bottom, left, right) > 0:
        x = F.pad(x, (*[0, 0] * (x.dim() - 3), left, right, top, bottom))
    patches = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # [B, Ho, Wo, ..., C, K, K]
    return patches.movedim(-3, -1).contiguous()


class Neighbourhoods(torch.autograd.Function):
    """``neighbourhoods`` of x [B, H, W, C], and its adjoint: runs of K*C and of stride*C numbers are copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int) -> Tensor:
        ctx.shape, ctx.kernel, ctx.stride = x.shape, kernel, stride
        return neighbourhoods(x, kernel, stride)

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


def channels_last_features(parameter: Tensor, channels: int, order: str) -> Tensor:
    """[..., C*K*K] in one of the orders of ``patch_merge`` -> [..., K*K*C], ordered (row, column, channel)."""
    if order == "unfold":
        return parameter.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)
    kernel = round((parameter.shape[-1] // channels) ** 0.5)
    return parameter.unflatten(-1, (kernel, kernel, channels)).transpose(-2, -3).flatten(-3)


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
    """``patch_merge`` with LayerNorm, of parameters that ``channels_last_features`` returned; reverse mode only."""
    patches = Neighbourhoods.apply(x, kernel, stride).flatten(3)  # [B, Ho, Wo, K*K*C]
    return F.linear(F.layer_norm(patches, (patches.shape[3],), norm_weight, norm_bias, eps), weight, bias)
