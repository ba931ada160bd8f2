"""Replacements for timm's patch embeddings that normalise their tokens: convolution and LayerNorm in one op."""

from __future__ import annotations

from typing import Any

from timm.layers import Format, LayerNorm, PatchEmbed
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from ..ops.windows import window_padding
from .replacement import Replacement, why_not_bypass

NORMS = (nn.LayerNorm, LayerNorm)


def why_not_convolve(proj: nn.Conv2d) -> str | None:
    """Why the op cannot be a convolution."""
    square = all(pair[0] == pair[1] for pair in (proj.stride, proj.kernel_size, proj.dilation))
    plain = proj.groups == 1 and proj.padding_mode == "zeros"
    return None if square and plain and not isinstance(proj.padding, str) else f"its proj is {proj}"


def why_not_embed(module: Any) -> str | None:
    """Why `proj` and `norm` of a patch embedding cannot be one op."""
    why = why_not_bypass(module, proj=nn.Conv2d, norm=NORMS)
    if why is None and module.norm.weight is None:
        why = "its norm has no weight"
    return why or why_not_convolve(module.proj)


def embed(module: Any, image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """[B, Cin, H, W], zeros at (left, right, top, bottom) -> [B, Ho, Wo, C]."""
    proj, norm = module.proj, module.norm
    stride, dilation = proj.stride[0], proj.dilation[0]
    return patch_embed(image, proj.weight, proj.bias, stride, dilation, padding, norm.weight, norm.bias, norm.eps)


class FastPatchEmbed(Replacement, PatchEmbed):
    """Patches that do not overlap, for tokens [B, N, C] or maps [B, H, W, C]."""

    source = PatchEmbed

    @classmethod
    def gainless(cls, module: Any) -> str | None:
        return "it does not normalise: nothing to fuse" if type(module.norm) is nn.Identity else None

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        if not module.flatten and module.output_fmt not in (Format.NHWC, Format.NLC):
            return f"its output is {module.output_fmt.value}"
        return why_not_embed(module)

    def forward(self, x: Tensor) -> Tensor:
        size, patch = x.shape[2:], self.patch_size
        below, right = window_padding(size[0], patch[0]), window_padding(size[1], patch[1])
        pads = below > 0 or right > 0
        wrong = self.img_size is not None and (
            tuple(size) != tuple(self.img_size) if self.strict_img_size else pads and not self.dynamic_img_pad
        )
        if wrong or not self.usable():  # the source says what is wrong
            return super().forward(x)
        padding = (0, right, 0, below) if self.dynamic_img_pad else (0, 0, 0, 0)
        x = embed(self, x, padding)  # [B, H, W, C]
        return x.flatten(1, 2) if self.flatten or self.output_fmt == Format.NLC else x


class FastOverlapPatchEmbed(Replacement, OverlapPatchEmbed):
    """PVT v2's (arXiv 2106.13797): [B, Cin, H, W] -> [B, Ho, Wo, C]."""

    source = OverlapPatchEmbed

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        return why_not_embed(module)

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable():
            return super().forward(x)
        rows, columns = (int(size) for size in self.proj.padding)
        return embed(self, x, (columns, columns, rows, rows))
