"""Replacements for the Swin Transformer of CLAP (HTS-AT, arXiv 2202.00874) in Hugging Face's transformers."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.clap.modeling_clap import (
    ClapAudioAttention,
    ClapAudioLayer,
    ClapAudioPatchMerging,
    ClapAudioSelfAttention,
    ClapAudioSelfOutput,
)

from .replacement import Parts
from .transformers_layers import SplitLayer, TokenMerging


class FastClapAudioLayer(SplitLayer, ClapAudioLayer):
    """Computes the attention of whole maps with the weights of its `attention`."""

    parts: ClassVar[Parts] = SplitLayer.split_parts(ClapAudioAttention, ClapAudioSelfAttention, ClapAudioSelfOutput)


class FastClapAudioPatchMerging(TokenMerging, ClapAudioPatchMerging):
    """Tokens [B, H*W, C] -> [B, ceil(H/2)*ceil(W/2), 2*C]."""
