"""Overlapping patch merging."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.patch_merge import pad_for_merging, patch_merge
from .plain import is_plain

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
        if not torch.jit.is_scripting() and self._calls_layers():
            return self._by_layers(x)
        norm_weight: Tensor | None = None
        norm_bias: Tensor | None = None
        eps = 1e-5
        if self.norm is not None:
            norm_weight, norm_bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
        return patch_merge(x, self.reduction.weight, self.kernel, 2, norm_weight, norm_bias, None, eps)

    @torch.jit.unused
    def _calls_layers(self) -> bool:
        return not (is_plain(self.reduction, nn.Linear) and is_plain(self.norm, nn.LayerNorm))

    @torch.jit.unused
    def _by_layers(self, x: Tensor) -> Tensor:
        """With adapters, quantised layers and hooks: every layer is called."""
        size = [-(-side // 2) for side in x.shape[1:3]]  # rows, columns
        x = pad_for_merging(x, self.kernel, 2)  # [B, C, H', W']
        patches = F.unfold(x, self.kernel, stride=2).transpose(1, 2)  # [B, Ho*Wo, C*K*K]
        patches = patches if self.norm is None else self.norm(patches)
        return self.reduction(patches).unflatten(1, size)
