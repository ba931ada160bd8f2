"""Replacements for timm's own layers that many of its networks are made of."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.layers import Format, Mlp, PatchEmbed
from torch import Tensor, nn

from ..ops.windows import window_padding
from .chunked_mlp import ChunkedMlp
from .embedding import Embedding
from .replacement import Names, made_by_package


class FastPatchEmbed(Embedding, PatchEmbed):
    """Patches that do not overlap, for tokens [B, N, C] or maps [B, H, W, C]."""

    reads: ClassVar[Names] = ("patch_size", "img_size", "strict_img_size", "dynamic_img_pad", "flatten", "output_fmt")

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


class FastMlp(ChunkedMlp, Mlp):
    """The feed-forward network of most transformers."""

    order = ("fc1", "act", "norm", "fc2")
