"""Replacements for the modules of As-ViT's original code (arXiv 2202.11921), recognised where it is met.

That code is no package: its classes are found by name when a model has them, and what stands here becomes a subclass
of them then.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from ..ops.patch_merge import patch_merge
from ..ops.window_attention import window_attention
from .embedding import why_not_convolve
from .mlp import InParts
from .replacement import Replacement, attention_dropout, bound, why_not_bypass

MAYBE_NORM = (nn.LayerNorm, nn.Identity)  # switch_norm exchanges them


def _norm(norm: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """Weight, bias, eps of a LayerNorm; no weight for an Identity or None."""
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, None, 1e-5)


class FromAuthors(Replacement):
    """Pickles as its source and the name of the replacement, as its class is made at run time."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return make, (type(self).__bases__[0], self.source), vars(self)


def make(replacement: type[Replacement], source: type[nn.Module]) -> Any:
    """An instance without state, for unpickling and deepcopy."""
    kind = bound(replacement, source)
    return kind.__new__(kind)


class FastAuthorsWindowAttention(FromAuthors):
    """Takes a map [B, H, W, C] if it is given a ``shift``, and windows [B*windows, N, C] as its source does if not."""

    only_inside = "TransformerBlock"

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        matmul = sys.modules[cls.source.__module__].matmul
        return why_not_bypass(module, softmax=nn.Softmax, attn_drop=nn.Dropout, mat=matmul)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None, shift: tuple[int, int] | None = None) -> Tensor:
        if shift is None:
            return self.source.forward(self, x, mask)
        dropout = attention_dropout(self.attn_drop.p, self.attn_drop.training)
        x = window_attention(
            self.qkv(x), self.num_heads, self.window_size, shift, None, self.scale, dropout, "timm"
        )  # [B, H, W, inner_dim]
        return self.proj_drop(self.proj(x))


class FastAuthorsTransformerBlock(FromAuthors):
    """Tokens [B, H*W, C]; hands whole maps to its attention."""

    inner = (("attn", FastAuthorsWindowAttention),)

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        divides = height % self.window_size == 0 and width % self.window_size == 0
        if x.shape[1] != height * width or not divides or not self.usable():
            return self.source.forward(self, x)
        tokens = self.norm1(x).unflatten(1, (height, width))  # [B, H, W, C]
        x = x + self.drop_path(self.attn(tokens, shift=(self.shift_size, self.shift_size)).flatten(1, 2))
        for mlp in self.mlps:
            x = x + self.drop_path(mlp(x))
        return x


class FastAuthorsPatchMerging(FromAuthors):
    """Tokens [B, H*W, C] -> [B, H/2*W/2, Cout]."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_bypass(module, norm=MAYBE_NORM, reduction=nn.Linear, soft_split=nn.Unfold, padding=nn.ZeroPad2d)

    def forward(self: Any, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        if x.shape[1] != height * width or height % 2 or width % 2 or not self.usable():
            return self.source.forward(self, x)
        weight, bias, eps = _norm(self.norm)
        maps = x.unflatten(1, (height, width))  # [B, H, W, C]
        return patch_merge(maps, self.reduction.weight, self.kernel, 2, weight, bias, None, eps).flatten(1, 2)


class FastAuthorsPatchEmbed(FromAuthors):
    """Images [B, Cin, H, W] -> tokens [B, Ho*Wo, C]."""

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if min(module.padding.padding) < 0:
            return "its patches are smaller than its stride"
        why = why_not_bypass(module, proj=nn.Conv2d, padding=nn.ZeroPad2d, norm=(*MAYBE_NORM, type(None)))
        return why or why_not_convolve(module.proj)

    def forward(self: Any, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.img_size) or not self.usable():
            return self.source.forward(self, x)
        weight, bias, eps = _norm(self.norm)
        proj = self.proj
        stride, dilation, zeros = proj.stride[0], proj.dilation[0], self.padding.padding
        tokens = patch_embed(x, proj.weight, proj.bias, stride, dilation, zeros, weight, bias, eps)
        return tokens.flatten(1, 2)


class FastAuthorsMlp(FromAuthors, InParts):
    """Their feed-forward network."""
