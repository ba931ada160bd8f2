"""Replacement for the layer of Swin Transformer V2 (arXiv 2111.09883) in Hugging Face's transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2Attention,
    Swinv2Layer,
    Swinv2SelfAttention,
    Swinv2SelfOutput,
)

from .replacement import Parts
from .transformers_layers import CosineLayer


class FastSwinv2Layer(CosineLayer, Swinv2Layer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = CosineLayer.split_parts(Swinv2Attention, Swinv2SelfAttention, Swinv2SelfOutput)
