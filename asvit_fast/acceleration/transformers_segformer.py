"""Replacement for the patch embedding of SegFormer (arXiv 2105.15203) in Hugging Face's transformers."""

from __future__ import annotations

from transformers.models.segformer.modeling_segformer import SegformerOverlapPatchEmbeddings

from .embedding import TokenEmbedding


class FastSegformerOverlapPatchEmbeddings(TokenEmbedding, SegformerOverlapPatchEmbeddings):
    """[B, Cin, H, W] -> [B, Ho*Wo, C], Ho and Wo."""
