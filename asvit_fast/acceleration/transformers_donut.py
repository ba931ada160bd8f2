"""Replacements for the Swin Transformer of Donut (arXiv 2111.15664) and Nougat (arXiv 2308.13418) in Hugging Face's
transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.donut.modeling_donut_swin import (
    DonutSwinAttention,
    DonutSwinLayer,
    DonutSwinPatchMerging,
    DonutSwinSelfAttention,
    DonutSwinSelfOutput,
)

from .replacement import Parts
from .transformers_layers import SplitLayer, TokenMerging


class FastDonutSwinLayer(SplitLayer, DonutSwinLayer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = SplitLayer.split_parts(DonutSwinAttention, DonutSwinSelfAttention, DonutSwinSelfOutput)


class FastDonutSwinPatchMerging(TokenMerging, DonutSwinPatchMerging):
    """Tokens [B, H*W, C] -> [B, ceil(H/2)*ceil(W/2), 2*C]."""
