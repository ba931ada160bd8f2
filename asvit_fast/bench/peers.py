"""The ops in torch's own operations, as networks have them: peers of ours, and in float64 what all are held against."""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.patch_merge import merge_padding
from ..ops.windows import merge_windows, partition_windows, split_heads, window_mask


def attention_eager(qkv: Tensor, heads: int, window: list[int], shift: list[int], bias: Tensor | None) -> Tensor:
    """Windowed attention as timm's Swin computes it by default: every step an operation. qkv [B, H, W, 3*heads*d]."""
    size = list(qkv.shape[1:-1])
    q, k, v = split_heads(partition_windows(qkv, window, shift), heads)  # [B, windows, heads, tokens, d]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, windows, heads, tokens, tokens]
    if bias is not None:
        scores = scores + bias
    mask = window_mask(size, window, shift, scores.dtype, scores.device)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)  # [B, windows, tokens, heads*d]
    return merge_windows(out, size, window, shift)


def attention_mask(qkv: Tensor, window: list[int], shift: list[int], bias: Tensor | None, copies: int) -> Tensor | None:
    """Mask of SDPA for windows [B*windows, heads, tokens, d]: bias and mask in one."""
    mask = window_mask(list(qkv.shape[1:-1]), window, shift, qkv.dtype, qkv.device)
    if mask is None:
        return None if bias is None else bias.unsqueeze(0)
    mask = mask.unsqueeze(1) if bias is None else mask.unsqueeze(1) + bias
    return mask.expand(copies, -1, -1, -1, -1).flatten(0, 1)


def attention_sdpa(
    qkv: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    bias: Tensor | None,
    backend: SDPBackend | None = None,
    pad_to: int = 1,
) -> Tensor:
    """torch's fused attention with one of its backends; head_dim padded with zeros to a multiple of `pad_to`."""
    batch, size = qkv.shape[0], list(qkv.shape[1:-1])
    q, k, v = (x.flatten(0, 1) for x in split_heads(partition_windows(qkv, window, shift), heads))
    mask = attention_mask(qkv, window, shift, bias, batch)
    head_dim = q.shape[-1]
    if head_dim % pad_to:
        q, k, v = (F.pad(x, (0, -head_dim % pad_to)) for x in (q, k, v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=head_dim**-0.5)
    out = out[..., :head_dim].unflatten(0, (batch, -1)).transpose(2, 3).flatten(3)
    return merge_windows(out, size, window, shift)


def merge_unfolded(
    x: Tensor, weight: Tensor, kernel: int, stride: int, norm_weight: Tensor, norm_bias: Tensor, order: str = "unfold"
) -> Tensor:
    """Patch merging as As-ViT's authors do it, x [B, H, W, C]; on Swin's shapes the timing is that of features in their
    order."""
    rows, columns = (merge_padding(size, kernel, stride) for size in x.shape[1:3])
    patches = F.unfold(F.pad(x.permute(0, 3, 1, 2), columns + rows), kernel, stride=stride).transpose(1, 2)
    if order == "timm":  # a view of the features, so that the result is right
        patches = patches.unflatten(2, (-1, kernel, kernel)).transpose(2, 4).flatten(2)
    patches = F.layer_norm(patches, (patches.shape[2],), norm_weight, norm_bias)
    return F.linear(patches, weight).unflatten(1, (-(-x.shape[1] // stride), -(-x.shape[2] // stride)))


def embed_convolution(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    padding: tuple[int, int, int, int],
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> Tensor:
    """Patch embedding as a user of torch writes it, image [B, 3, H, W]; channels_last if the operands are."""
    symmetric = len(set(padding)) == 1
    if not symmetric:
        image = F.pad(image, padding)
    tokens = F.conv2d(image, weight, bias, stride, padding[0] if symmetric else 0, dilation).permute(0, 2, 3, 1)
    return F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias).contiguous()
