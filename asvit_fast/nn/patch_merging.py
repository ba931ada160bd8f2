"""Overlapping patch merging."""

from typing import Any

import torch.fx
from torch import Tensor, nn

from ..ops.patch_merge import patch_merge

torch.fx.wrap("patch_merge")  # it branches on sizes, which torch.fx does not know while it traces


class PatchMerging(nn.Module):
    """K x K neighbourhoods with stride 2, LayerNorm ``norm``, Linear ``reduction`` without bias.

    [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), out_dim] (As-ViT, arXiv 2202.11921, section 3.1).
    """

    def __init__(
        self, kernel: int, dim: int, out_dim: int, norm: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.kernel = kernel
        features = kernel * kernel * dim
        self.norm = nn.LayerNorm(features, **factory) if norm else None
        self.reduction = nn.Linear(features, out_dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        norm_weight: Tensor | None = None
        norm_bias: Tensor | None = None
        eps = 1e-5
        if self.norm is not None:
            norm_weight, norm_bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return patch_merge(x, self.reduction.weight, self.kernel, 2, norm_weight, norm_bias, None, eps)
