"""Overlapping patch embedding with token reduction."""

from typing import Any

import torch.fx
from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from ..tokens import check_token_reduction

torch.fx.wrap("embed_patches")  # it branches on sizes, which torch.fx does not know while it traces


def dilation_of(kernel: int, reduction: int) -> int:
    """The dilation with which K x K weights cover about ``reduction`` * K pixels per side (As-ViT, arXiv 2202.11921,
    section 3.4)."""
    return round((reduction - 1) * kernel / max(kernel - 1, 1)) + 1


def embed_patches(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    dilation: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``patch_embed`` padded so that the grid is ceil(image / stride): [B, Cin, H, W] -> [B, Ho, Wo, C]."""
    span = dilation * (weight.shape[2] - 1) + 1  # pixels that one patch covers
    before = max(span - stride, 0) // 2
    height, width = image.shape[2], image.shape[3]
    below = (-(-height // stride) - 1) * stride + span - height - before
    right = (-(-width // stride) - 1) * stride + span - width - before
    # comparisons, as max() would stay in every size that torch.compile derives for images of any size
    padding = (before, right if right > 0 else 0, before, below if below > 0 else 0)
    return patch_embed(image, weight, bias, stride, dilation, padding, norm_weight, norm_bias, eps)


class OverlapPatchEmbed(nn.Module):
    """Convolution ``proj`` of K x K pixels with stride 4 and LayerNorm ``norm``: image [B, Cin, H, W] -> [B, Ho, Wo,
    C].

    ``set_token_reduction(r)`` makes the grid r times coarser per side with the same weights: stride 4r and the dilation
    of As-ViT (arXiv 2202.11921), section 3.4.
    """

    def __init__(
        self,
        kernel: int,
        dim: int,
        in_chans: int = 3,
        stride: int = 4,
        norm: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.kernel = kernel
        self.base_stride = stride
        self.stride = stride
        self.dilation = 1
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, **factory)
        self.norm = nn.LayerNorm(dim, **factory) if norm else None

    def set_token_reduction(self, reduction: int) -> None:
        """1, 2 or 4 times fewer tokens per side.

        Raises:
            InputError: any other reduction.
        """
        check_token_reduction(reduction)
        self.stride = self.base_stride * reduction
        self.dilation = dilation_of(self.kernel, reduction)

    def forward(self, image: Tensor) -> Tensor:
        norm_weight: Tensor | None = None
        norm_bias: Tensor | None = None
        eps = 1e-5
        if self.norm is not None:
            norm_weight, norm_bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return embed_patches(
            image, self.proj.weight, self.proj.bias, self.stride, self.dilation, norm_weight, norm_bias, eps
        )
