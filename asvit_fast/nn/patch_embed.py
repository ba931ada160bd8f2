"""Overlapping patch embedding with token reduction."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.patch_embed import patch_embed
from ..tokens import check_token_reduction
from .plain import is_plain

torch.fx.wrap("embed_patches")  # it branches on sizes, which torch.fx does not know while it traces


def dilation_of(kernel: int, reduction: int) -> int:
    """The dilation with which K x K weights cover about ``reduction`` * K pixels per side (As-ViT, arXiv 2202.11921,
    section 3.4)."""
    return round((reduction - 1) * kernel / max(kernel - 1, 1)) + 1


def _padding(image: Tensor, kernel: int, stride: int, dilation: int) -> tuple[int, int, int, int]:
    """Pixels to the left, to the right, above, below, with which the grid is ceil(image / stride)."""
    span = dilation * (kernel - 1) + 1  # pixels that one patch covers
    before = max(span - stride, 0) // 2
    height, width = image.shape[2], image.shape[3]
    below = (-(-height // stride) - 1) * stride + span - height - before
    right = (-(-width // stride) - 1) * stride + span - width - before
    # comparisons, as max() would stay in every size that torch.compile derives for images of any size
    return before, right if right > 0 else 0, before, below if below > 0 else 0


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
    padding = _padding(image, weight.shape[2], stride, dilation)
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
        if not torch.jit.is_scripting() and self._calls_layers():
            return self._by_layers(image)
        norm_weight: Tensor | None = None
        norm_bias: Tensor | None = None
        eps = 1e-5
        if self.norm is not None:
            norm_weight, norm_bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return embed_patches(
            image, self.proj.weight, self.proj.bias, self.stride, self.dilation, norm_weight, norm_bias, eps
        )

    @torch.jit.unused
    def _calls_layers(self) -> bool:
        return not (is_plain(self.proj, nn.Conv2d) and is_plain(self.norm, nn.LayerNorm))

    @torch.jit.unused
    def _by_layers(self, image: Tensor) -> Tensor:
        """With adapters, quantised layers and hooks: every layer is called."""
        if self.stride != self.base_stride:
            raise InputError(
                f"fewer tokens need the plain Conv2d and LayerNorm of the patch embedding; proj is a "
                f"{type(self.proj).__name__}, norm a {type(self.norm).__name__}, or one has hooks: merge adapters, "
                "remove hooks, or train with full tokens"
            )
        image = F.pad(image, _padding(image, self.kernel, self.stride, self.dilation))
        tokens = self.proj(image).permute(0, 2, 3, 1)  # [B, Ho, Wo, C]
        return tokens if self.norm is None else self.norm(tokens)
