"""Base class of replacements for patch embeddings that normalise their tokens: convolution and LayerNorm in one op."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import LayerNorm
from torch import Tensor, nn

from ..ops.patch_embed import patch_embed
from .replacement import Parts, Replacement, bypass_reason


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
