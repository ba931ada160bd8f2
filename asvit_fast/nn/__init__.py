"""Modules on top of the ops."""

from .attention import WindowAttention
from .feat_scale import FeatScale
from .linear import Linear
from .patch_embed import OverlapPatchEmbed
from .patch_merging import PatchMerging

__all__ = ["FeatScale", "Linear", "OverlapPatchEmbed", "PatchMerging", "WindowAttention"]
