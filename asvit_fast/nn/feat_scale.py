"""FeatScale: what attention gives to the mean of a feature map and to the rest of it, weighed per channel."""

from typing import Any

import torch
from torch import Tensor, nn


class FeatScale(nn.Module):
    """x + s mean(x) + t (x - mean(x)), the mean over all tokens: x [B, *tokens, dim] -> the same shape.

    ``low`` (s) and ``high`` (t), [dim] each, are learned and start at zero, where the module is the identity. Source:
    arXiv 2203.05962, section 4.2.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.high = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1, -2).mean(1)  # [B, dim]
        while mean.dim() < x.dim():
            mean = mean.unsqueeze(1)
        return (1.0 + self.high) * x + (self.low - self.high) * mean
