"""Replacement for the patch embedding of GLPN (arXiv 2201.07436) in Hugging Face's transformers."""

from __future__ import annotations

from transformers.models.glpn.modeling_glpn import GLPNOverlapPatchEmbeddings

from .embedding import TokenEmbedding


class FastGLPNOverlapPatchEmbeddings(TokenEmbedding, GLPNOverlapPatchEmbeddings):
    """[B, Cin, H, W] -> [B, Ho*Wo, C], Ho and Wo."""
