"""Base class of replacements for patch embeddings that normalise their tokens: convolution and LayerNorm in one op."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import LayerNorm
from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from .replacement import Parts, Replacement, bypass_reason

FEW = 16  # channels of an image up to which the op is faster; from 64 on torch's convolution is


def convolution_reason(proj: Any, pads: bool) -> str | None:
    """Why the op cannot be a convolution, which pads its input or does not."""
    square = all(pair[0] == pair[1] for pair in (proj.stride, proj.kernel_size, proj.dilation))
    plain = proj.groups == 1 and proj.padding_mode == "zeros" and not isinstance(proj.padding, str)
    return None if square and plain and (pads or not any(proj.padding)) else f"its proj is {proj}"


class Embedding(Replacement):
    """`proj`, then a LayerNorm."""

    ops = ("patch_embed",)
    parts: ClassVar[Parts] = {"proj": (nn.Conv2d,), "norm": (nn.LayerNorm, LayerNorm)}
    norm_name: ClassVar[str] = "norm"
    pads: ClassVar[bool] = False  # whether `proj` does

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        why = bypass_reason(module, cls.parts)
        if why is None and getattr(module, cls.norm_name).weight is None:
            why = f"its {cls.norm_name} has no weight"
        return why or convolution_reason(module.proj, cls.pads)

    def _embed(self: Any, image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        """[B, Cin, H, W], zeros at (left, right, top, bottom) -> [B, Ho, Wo, C]."""
        proj, norm = self.proj, getattr(self, self.norm_name)
        stride, dilation = proj.stride[0], proj.dilation[0]
        return patch_embed(image, proj.weight, proj.bias, stride, dilation, padding, norm.weight, norm.bias, norm.eps)


class OverlappingEmbedding(Embedding):
    """Base class for patches that overlap, as those of PVT v2 (arXiv 2106.13797) and SegFormer (arXiv 2105.15203)."""

    pads = True

    @classmethod
    def skip_reason(cls, module: Any) -> str | None:
        channels = getattr(module._modules.get("proj"), "in_channels", 0)
        return None if channels <= FEW else f"of {channels} channels torch's convolution is as fast or faster"

    def _overlapping(self: Any, image: Tensor) -> Tensor:
        """[B, Cin, H, W] -> [B, Ho, Wo, C]."""
        rows, columns = (int(size) for size in self.proj.padding)
        return self._embed(image, (columns, columns, rows, rows))


class TokenEmbedding(OverlappingEmbedding):
    """The same in Hugging Face's transformers, which give tokens [B, Ho*Wo, C] with the size of their map."""

    parts: ClassVar[Parts] = {"proj": (nn.Conv2d,), "layer_norm": (nn.LayerNorm,)}
    norm_name = "layer_norm"

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, int, int]:
        if not self.can_run():
            return super().forward(pixel_values)  # type: ignore[misc]
        tokens = self._overlapping(pixel_values)  # [B, Ho, Wo, C]
        return tokens.flatten(1, 2), tokens.shape[1], tokens.shape[2]
