"""Modules on top of the ops."""

from .attention import WindowAttention
from .patch_embed import OverlapPatchEmbed
from .patch_merging import PatchMerging

__all__ = ["OverlapPatchEmbed", "PatchMerging", "WindowAttention"]
