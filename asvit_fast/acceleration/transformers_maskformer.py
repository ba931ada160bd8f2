"""Replacements for the Swin Transformer of MaskFormer (arXiv 2107.06278) in Hugging Face's transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.maskformer.modeling_maskformer_swin import (
    MaskFormerSwinAttention,
    MaskFormerSwinLayer,
    MaskFormerSwinPatchMerging,
    MaskFormerSwinSelfAttention,
    MaskFormerSwinSelfOutput,
)

from .replacement import Parts
from .transformers_layers import SplitLayer, TokenMerging


class FastMaskFormerSwinLayer(SplitLayer, MaskFormerSwinLayer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = SplitLayer.split_parts(
        MaskFormerSwinAttention, MaskFormerSwinSelfAttention, MaskFormerSwinSelfOutput
    )


class FastMaskFormerSwinPatchMerging(TokenMerging, MaskFormerSwinPatchMerging):
    """Tokens [B, H*W, C] -> [B, ceil(H/2)*ceil(W/2), 2*C]."""
