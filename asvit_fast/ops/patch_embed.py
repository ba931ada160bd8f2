"""Overlapping, dilated patch embedding: image -> normalised tokens, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends


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
    tokens = F.conv2d(image, weight, bias, stride=stride, dilation=dilation).permute(0, 2, 3, 1)  # [B, Ho, Wo, C]
    if norm_weight is None:
        return tokens
    return F.layer_norm(tokens, (tokens.shape[3],), norm_weight, norm_bias, eps)


backends.declare("patch_embed", reference=patch_embed_reference)


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
        image: [B, Cin, H, W].
        weight: [C, Cin, K, K]; bias: [C] or None.
        stride, dilation: pixels; with token reduction the dilation keeps a patch about as wide as its stride
            (As-ViT, arXiv 2202.11921, section 3.4).
        padding: zeros at (left, right, top, bottom), in pixels.
        norm_weight, norm_bias: [C]; without ``norm_weight`` there is no LayerNorm.
        eps: LayerNorm's epsilon.

    Raises:
        ValueError: shapes that do not fit, naming the value.
    """
    if not torch.jit.is_scripting():
        operands = (image, weight, bias, norm_weight, norm_bias)
        if has_torch_function(operands):
            return handle_torch_function(
                patch_embed, operands, image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps
            )
        if backends.forced_backend() is not None:
            implementation = backends.select("patch_embed", image.device)
            return implementation(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps)
    if image.dim() != 4 or weight.dim() != 4 or image.shape[1] != weight.shape[1]:
        raise ValueError(
            f"patch_embed: image must be [B, Cin, H, W] and weight [C, Cin, K, K] with the same Cin, "
            f"got {list(image.shape)} and {list(weight.shape)}"
        )
    return patch_embed_reference(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps)
