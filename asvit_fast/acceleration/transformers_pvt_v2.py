"""Replacement for the patch embedding of PVT v2 (arXiv 2106.13797) in Hugging Face's transformers."""

from __future__ import annotations

from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2OverlapPatchEmbeddings

from .embedding import TokenEmbedding


class FastPvtV2OverlapPatchEmbeddings(TokenEmbedding, PvtV2OverlapPatchEmbeddings):
    """[B, Cin, H, W] -> [B, Ho*Wo, C], Ho and Wo."""
