"""The classes of other packages that are known, and what each becomes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from .replacement import Replacement, bound


@dataclass(frozen=True)
class Family:
    """A class of another package: what it becomes and what that brings, or why it is left alone."""

    source: str  # package.module.Class, or the end of it for code that is not a package
    replacement: str | None  # module.Class of this package, or None
    notes: str

    def table_row(self) -> str:
        """A row of the Markdown table that ``families_table`` makes."""
        becomes = "left alone" if self.replacement is None else f"`{self.replacement.rpartition('.')[2]}`"
        return f"| `{self.source}` | {becomes} | {self.notes} |"


def _timm(module: str, *rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"timm.models.{module}.{row[0]}", *row[1:]) for row in rows)


def _torchvision(*rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"torchvision.{row[0]}", *row[1:]) for row in rows)


def _monai(*rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"monai.networks.{row[0]}", *row[1:]) for row in rows)


def _transformers(module: str, *rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"transformers.models.{module}.{row[0]}", *row[1:]) for row in rows)


ATTENTION = "window attention without copies of windows"
PARTS = "inference on a CPU: tokens in parts that stay in the cache"
MERGE = "neighbourhoods normalised and projected in one op"
PRODUCT = "float32 on a CPU: products by oneDNN"
EMBED = "convolution and LayerNorm in one op"
POST_NORM = "it normalises after the projection: nothing to fuse"
FAMILIES: tuple[Family, ...] = (
    *_timm(
        "swin_transformer",
        ("SwinTransformerBlock", "timm_swin.FastSwinTransformerBlock", ATTENTION),
        ("PatchMerging", "timm_swin.FastPatchMerging", MERGE),
    ),
    *_timm(
        "swin_transformer_v2",
        ("SwinTransformerV2Block", "timm_swin_v2.FastSwinTransformerV2Block", ATTENTION),
        ("PatchMerging", None, POST_NORM),
    ),
    *_timm(
        "swin_transformer_v2_cr",
        ("SwinTransformerV2CrBlock", "timm_swin_v2.FastSwinTransformerV2CrBlock", ATTENTION),
    ),
    *_timm(
        "maxxvit",
        ("PartitionAttentionCl", "timm_maxvit.FastPartitionAttentionCl", ATTENTION),
        ("ParallelPartitionAttention", "timm_maxvit.FastParallelPartitionAttention", ATTENTION),
        ("Attention2d", None, "channels first: layout copies would cost what the kernel gains"),
    ),
    *_timm(
        "tiny_vit",
        ("TinyVitBlock", "timm_tiny_vit.FastTinyVitBlock", ATTENTION),
        ("NormMlp", "timm_tiny_vit.FastNormMlp", PARTS),
    ),
    *_timm(
        "davit",
        ("SpatialBlock", "timm_davit.FastSpatialBlock", ATTENTION),
        ("Stem", None, "below 1 percent of the network's time"),
    ),
    *_timm("twins", ("LocallyGroupedAttn", "timm_twins.FastLocallyGroupedAttn", ATTENTION)),
    *_timm("nest", ("Attention", "timm_nest.FastNestAttention", ATTENTION)),
    *_timm("pvt_v2", ("OverlapPatchEmbed", "timm_pvt.FastOverlapPatchEmbed", EMBED)),
    *_timm("convnext", ("ConvNeXt", None, "its stem: below 1 percent of the network's time")),
    Family("timm.layers.patch_embed.PatchEmbed", "timm_layers.FastPatchEmbed", EMBED),
    Family("timm.layers.mlp.Mlp", "timm_layers.FastMlp", PARTS),
    Family("torch.nn.modules.linear.Linear", "torch_linear.FastLinear", PRODUCT),
    *_torchvision(
        ("models.swin_transformer.ShiftedWindowAttention", "torchvision_swin.FastShiftedWindowAttention", ATTENTION),
        (
            "models.swin_transformer.ShiftedWindowAttentionV2",
            "torchvision_swin.FastShiftedWindowAttentionV2",
            ATTENTION,
        ),
        ("models.swin_transformer.PatchMerging", "torchvision_swin.FastTorchvisionPatchMerging", MERGE),
        ("models.swin_transformer.PatchMergingV2", None, POST_NORM),
        (
            "models.video.swin_transformer.ShiftedWindowAttention3d",
            "torchvision_swin3d.FastShiftedWindowAttention3d",
            ATTENTION,
        ),
        ("ops.misc.MLP", "torchvision_swin.FastTorchvisionMLP", PARTS),
    ),
    *_transformers(
        "swin.modeling_swin",
        ("SwinLayer", "transformers_swin.FastSwinLayer", ATTENTION),
        ("SwinPatchMerging", "transformers_swin.FastSwinPatchMerging", MERGE),
        ("SwinMLP", "transformers_swin_mlp.FastSwinMLP", PARTS),
    ),
    *_transformers(
        "donut.modeling_donut_swin",
        ("DonutSwinLayer", "transformers_donut.FastDonutSwinLayer", ATTENTION),
        ("DonutSwinPatchMerging", "transformers_donut.FastDonutSwinPatchMerging", MERGE),
    ),
    *_transformers(
        "maskformer.modeling_maskformer_swin",
        ("MaskFormerSwinLayer", "transformers_maskformer.FastMaskFormerSwinLayer", ATTENTION),
        ("MaskFormerSwinPatchMerging", "transformers_maskformer.FastMaskFormerSwinPatchMerging", MERGE),
    ),
    *_transformers(
        "clap.modeling_clap",
        ("ClapAudioLayer", "transformers_clap.FastClapAudioLayer", ATTENTION),
        ("ClapAudioPatchMerging", "transformers_clap.FastClapAudioPatchMerging", MERGE),
    ),
    *_transformers(
        "swinv2.modeling_swinv2",
        ("Swinv2Layer", "transformers_swinv2.FastSwinv2Layer", ATTENTION),
        ("Swinv2PatchMerging", None, POST_NORM),
    ),
    *_transformers(
        "swin2sr.modeling_swin2sr",
        ("Swin2SRLayer", "transformers_swin2sr.FastSwin2SRLayer", ATTENTION),
    ),
    *_transformers(
        "florence2.modeling_florence2",
        ("Florence2VisionWindowAttention", "transformers_florence2.FastFlorence2VisionWindowAttention", ATTENTION),
        ("Florence2VisionMLP", "transformers_florence2.FastFlorence2VisionMLP", PARTS),
    ),
    *_transformers(
        "hiera.modeling_hiera",
        ("HieraMaskUnitAttention", "transformers_hiera.FastHieraMaskUnitAttention", ATTENTION),
        ("HieraMlp", "transformers_hiera.FastHieraMlp", PARTS),
    ),
    *_transformers(
        "sam2.modeling_sam2",
        ("Sam2MultiScaleBlock", "transformers_sam2.FastSam2MultiScaleBlock", ATTENTION),
    ),
    *_transformers(
        "vitdet.modeling_vitdet",
        ("VitDetLayer", "transformers_vitdet.FastVitDetLayer", ATTENTION),
    ),
    *_transformers(
        "segformer.modeling_segformer",
        ("SegformerOverlapPatchEmbeddings", "transformers_segformer.FastSegformerOverlapPatchEmbeddings", EMBED),
    ),
    *_transformers(
        "pvt_v2.modeling_pvt_v2",
        ("PvtV2OverlapPatchEmbeddings", "transformers_pvt_v2.FastPvtV2OverlapPatchEmbeddings", EMBED),
    ),
    *_transformers(
        "glpn.modeling_glpn",
        ("GLPNOverlapPatchEmbeddings", "transformers_glpn.FastGLPNOverlapPatchEmbeddings", EMBED),
    ),
    *_monai(
        ("nets.swin_unetr.SwinTransformerBlock", "monai_swin_unetr.FastSwinUNETRBlock", ATTENTION),
        ("nets.swin_unetr.BasicLayer", "monai_swin_unetr.FastSwinUNETRStage", "no mask is made"),
        ("nets.swin_unetr.PatchMerging", "monai_swin_unetr.FastSwinUNETRPatchMerging", f"of images: {MERGE}"),
        ("nets.swin_unetr.PatchMergingV2", "monai_swin_unetr.FastSwinUNETRPatchMergingV2", f"of images: {MERGE}"),
        ("blocks.mlp.MLPBlock", "monai_swin_unetr.FastMonaiMLP", PARTS),
    ),
    Family("cell_operations.TransformerBlock", "asvit_original.FastAuthorsTransformerBlock", ATTENTION),
    Family("cell_operations.PatchMerging", "asvit_original.FastAuthorsPatchMerging", MERGE),
    Family("cell_operations.Mlp", "asvit_original.FastAuthorsMlp", PARTS),
    Family("cell_infers.transformer.PatchEmbed", "asvit_original.FastAuthorsPatchEmbed", EMBED),
)


def families_table() -> str:
    """``FAMILIES`` as a Markdown table."""
    head = ["| module | becomes | what it brings |", "|---|---|---|"]
    return "\n".join([*head, *(family.table_row() for family in FAMILIES)])


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def family_of(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """The family of the class of a module or of the nearest known base, and that class."""
    for kind in type(module).__mro__:
        name = qualified_name(kind)
        for family in FAMILIES:
            if name == family.source or name.endswith(f".{family.source}"):
                return family, kind
    return None


def replacement_of(family: Family, source: type[nn.Module]) -> type[Replacement] | None:
    """The class that instances of a known class may become; ImportError or AttributeError if its package is of another
    version."""
    if family.replacement is None:
        return None
    file, _, name = family.replacement.rpartition(".")
    return bound(getattr(importlib.import_module(f"{__package__}.{file}"), name), source)
