"""Replacement for the layer of Swin2SR (arXiv 2209.11345) in Hugging Face's transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.swin2sr.modeling_swin2sr import (
    Swin2SRAttention,
    Swin2SRLayer,
    Swin2SRSelfAttention,
    Swin2SRSelfOutput,
)

from .replacement import Parts
from .transformers_layers import CosineLayer


class FastSwin2SRLayer(CosineLayer, Swin2SRLayer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = CosineLayer.split_parts(Swin2SRAttention, Swin2SRSelfAttention, Swin2SRSelfOutput)
