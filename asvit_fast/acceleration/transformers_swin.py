"""Replacements for the Swin Transformer of Hugging Face's transformers (arXiv 2103.14030), which backbones of its
detection and segmentation networks are."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers.models.swin import modeling_swin
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer, SwinPatchMerging

from .replacement import Parts
from .transformers_layers import JoinedLayer, SplitLayer, TokenMerging

modeling: Any = modeling_swin  # versions have other names in it
JOINED = hasattr(modeling, "SwinMLP")
Layer: Any = JoinedLayer if JOINED else SplitLayer


class FastSwinLayer(Layer, SwinLayer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = (
        JoinedLayer.joined_parts(SwinAttention, modeling.SwinRelativePositionBias)
        if JOINED
        else SplitLayer.split_parts(SwinAttention, modeling.SwinSelfAttention, modeling.SwinSelfOutput)
    )


class FastSwinPatchMerging(TokenMerging, SwinPatchMerging):
    """Tokens [B, H*W, C] -> [B, ceil(H/2)*ceil(W/2), 2*C]."""
