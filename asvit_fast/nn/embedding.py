"""Replacements for timm's patch embeddings that normalise their tokens: convolution and LayerNorm in one op."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import Format, LayerNorm, PatchEmbed
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from ..ops.windows import window_padding
from .replacement import Parts, Replacement, bypass_reason, made_by_package

FEW = 16  # channels of an image up to which the op is faster; from 64 on torch's convolution is


def convolution_reason(proj: Any, pads: bool) -> str | None:
    """Why the op cannot be a convolution, which pads its input or does not."""
    square = all(pair[0] == pair[1] for pair in (proj.stride, proj.kernel_size, proj.dilation))
    plain = proj.groups == 1 and proj.padding_mode == "zeros" and not isinstance(proj.padding, str)
    return None if square and plain and (pads or not any(proj.padding)) else f"its proj is {proj}"


class Embedding(Replacement):
    """`proj`, then `norm`."""

    ops = ("patch_embed",)
    parts: ClassVar[Parts] = {"proj": (nn.Conv2d,), "norm": (nn.LayerNorm, LayerNorm)}
    pads: ClassVar[bool] = False  # whether `proj` does

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        if why is None and module.norm.weight is None:
            why = "its norm has no weight"
        return why or convolution_reason(module.proj, cls.pads)

    def _embed(self: Any, image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        """[B, Cin, H, W], zeros at (left, right, top, bottom) -> [B, Ho, Wo, C]."""
        proj, norm = self.proj, self.norm
        stride, dilation = proj.stride[0], proj.dilation[0]
        return patch_embed(image, proj.weight, proj.bias, stride, dilation, padding, norm.weight, norm.bias, norm.eps)


class FastPatchEmbed(Embedding, PatchEmbed):
    """Patches that do not overlap, for tokens [B, N, C] or maps [B, H, W, C]."""

    source = PatchEmbed

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        norm = module._modules.get("norm")
        if type(norm) is nn.Identity:
            return "it does not normalise: nothing to fuse"
        if made_by_package(norm) and type(norm) not in cls.parts["norm"]:
            return f"it normalises by {type(norm).__name__}"
        if not module.flatten and module.output_fmt not in (Format.NHWC, Format.NLC):
            return f"its output is {module.output_fmt.value}"
        return None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = cls.skip_reason(module)  # set_token_reduction changes its output
        return why or super().unsupported_reason(module)

    def forward(self, x: Tensor) -> Tensor:
        size, patch = x.shape[2:], self.patch_size
        below, right = window_padding(size[0], patch[0]), window_padding(size[1], patch[1])
        pads = below > 0 or right > 0
        wrong = self.img_size is not None and (
            tuple(size) != tuple(self.img_size) if self.strict_img_size else pads and not self.dynamic_img_pad
        )
        if wrong or not self.can_run():  # the source says what is wrong
            return super().forward(x)
        padding = (0, right, 0, below) if self.dynamic_img_pad else (0, 0, 0, 0)
        x = self._embed(x, padding)  # [B, H, W, C]
        return x.flatten(1, 2) if self.flatten or self.output_fmt == Format.NLC else x


class FastOverlapPatchEmbed(Embedding, OverlapPatchEmbed):
    """PVT v2's (arXiv 2106.13797): [B, Cin, H, W] -> [B, Ho, Wo, C]."""

    source = OverlapPatchEmbed
    pads = True

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        channels = getattr(module._modules.get("proj"), "in_channels", 0)
        return None if channels <= FEW else f"of {channels} channels torch's convolution is as fast or faster"

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return super().forward(x)
        rows, columns = (int(size) for size in self.proj.padding)
        return self._embed(x, (columns, columns, rows, rows))
