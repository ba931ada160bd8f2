"""A learned position embedding on another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def resample_position_embedding(embedding: Tensor, size: tuple[int, int]) -> Tensor:
    """``embedding`` [1, H, W, C] on a grid of ``size`` (rows, columns), bicubic with antialiasing, as timm does it.

    torch's gradient of that adds up in an order that changes from run to run on a GPU: there it is two matrix products,
    so that a training repeats to the bit.
    """
    rows, columns = size
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return _resample_traced(embedding, rows, columns)
    if not embedding.is_cuda or (embedding.shape[1] == rows and embedding.shape[2] == columns):
        return resample_abs_pos_embed_nhwc(embedding, [rows, columns])
    return resample_by_products(embedding, rows, columns)


@torch.jit.unused
def _resample_traced(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """For a graph of any size, which resamples to the embedding's own grid too: that changes no number, and asking for
    the size would make another graph."""
    if statically_known_true(embedding.shape[1] == rows) and statically_known_true(embedding.shape[2] == columns):
        return embedding
    if embedding.is_cuda:
        return resample_by_products(embedding, rows, columns)
    maps = embedding.permute(0, 3, 1, 2).float()  # [1, C, H, W]
    resized = F.interpolate(maps, size=(rows, columns), mode="bicubic", antialias=True)
    return resized.to(embedding.dtype).permute(0, 2, 3, 1)


def resample_by_products(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """[1, H, W, C] -> [1, rows, columns, C]."""
    down = _weights(embedding.shape[1], rows, embedding.device)
    across = _weights(embedding.shape[2], columns, embedding.device)
    # neither autocast nor TF32 changes products of float64
    resized = torch.einsum("bhwc,xh,yw->bxyc", embedding.double(), down, across)
    return resized.to(embedding.dtype)


def _weights(old: int, new: int, device: torch.device) -> Tensor:
    """[new, old], float64: of the old points in each new one."""
    points = torch.eye(old, dtype=torch.float64, device=device)
    points = points.view(1, old, old, 1).expand(-1, -1, -1, 2)  # torch has images of one column wrong
    return F.interpolate(points, size=(new, 2), mode="bicubic", antialias=True)[0, :, :, 0].t()
