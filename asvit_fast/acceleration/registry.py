"""The classes of other packages, and of code that is no package, that are known, and what each becomes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from .replacement import Replacement, bound
from .structure import Structural, bound_to, is_own_code, looks_like, structure_reason


@dataclass(frozen=True)
class Family:
    """A class of another package: what it becomes and what that brings, or why it is left alone."""

    source: str  # package.module.Class; of code that is no package repository, file and class where it was seen
    replacement: str | type[Replacement] | None  # module.Class of this package, or a registered class, or None
    notes: str
    by_structure: bool = False  # recognised by its attributes and its code, whatever its name

    def table_row(self) -> str:
        """A row of the Markdown table that ``families_table`` makes."""
        becomes = "left alone" if self.replacement is None else f"`{self.replacement_name}`"
        return f"| `{self.source}` | {becomes} | {self.notes} |"

    @property
    def replacement_name(self) -> str:
        """The name of the class that it becomes; empty if it is left alone."""
        known = self.replacement.__name__ if isinstance(self.replacement, type) else self.replacement or ""
        return known.rpartition(".")[2]

    def load(self) -> type[Replacement] | None:
        """The class that it becomes; ImportError or AttributeError if its package is of another version."""
        if not isinstance(self.replacement, str):
            return self.replacement
        file, _, name = self.replacement.rpartition(".")
        return getattr(importlib.import_module(f"{__package__}.{file}"), name)


def _timm(module: str, *rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"timm.models.{module}.{row[0]}", *row[1:]) for row in rows)


def _torchvision(*rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"torchvision.{row[0]}", *row[1:]) for row in rows)


def _monai(*rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"monai.networks.{row[0]}", *row[1:]) for row in rows)


def _transformers(module: str, *rows: tuple[Any, ...]) -> tuple[Family, ...]:
    return tuple(Family(f"transformers.models.{module}.{row[0]}", *row[1:]) for row in rows)


def _structures(file: str, *rows: tuple[str, str, str]) -> tuple[Family, ...]:
    """Families of a file of this package: where the code was seen, the class, notes."""
    return tuple(Family(source, f"{file}.{name}", notes, by_structure=True) for source, name, notes in rows)


ATTENTION = "window attention without copies of windows"
PARTS = "inference on a CPU: GELU in the product, many tokens in parts that stay in the cache"
MERGE = "neighbourhoods normalised and projected in one op"
NO_MASK = "no mask is made"
PRODUCT = "on a CPU: packed weights, our kernel or oneDNN"
SUMS = "inference on a CPU: sums in the products"
EMBED = "convolution and LayerNorm in one op"
SMALL = "below 1 percent of the network's time"
CUT_ONCE = "windows are cut once for the whole network, with torch's fused attention inside"
QUERY_BIAS = "its bias depends on the query (decomposed relative positions)"
POST_NORM = "it normalises after the projection: nothing to fuse"
FAMILIES: tuple[Family, ...] = (
    Family("asvit_fast.models.asvit.Block", "asvit_block.FastBlock", SUMS),
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
        ("Stem", None, SMALL),
    ),
    *_timm("twins", ("LocallyGroupedAttn", "timm_twins.FastLocallyGroupedAttn", ATTENTION)),
    *_timm("nest", ("Attention", "timm_nest.FastNestAttention", ATTENTION)),
    *_timm("pvt_v2", ("OverlapPatchEmbed", "timm_pvt.FastOverlapPatchEmbed", EMBED)),
    *_timm("convnext", ("ConvNeXt", None, f"its stem: {SMALL}")),
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
        ("models.video.swin_transformer.PatchEmbed3d", None, SMALL),
        ("ops.misc.MLP", "torchvision_swin.FastTorchvisionMLP", PARTS),
    ),
    *_transformers(
        "swin.modeling_swin",
        ("SwinLayer", "transformers_swin.FastSwinLayer", ATTENTION),
        ("SwinPatchMerging", "transformers_swin.FastSwinPatchMerging", MERGE),
        ("SwinMLP", "transformers_swin_mlp.FastSwinMLP", PARTS),
        ("SwinEmbeddings", None, SMALL),
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
    *(
        Family(f"transformers.models.{source}", None, QUERY_BIAS)
        for source in (
            *("sam.modeling_sam.SamVisionLayer", "sam_hq.modeling_sam_hq.SamHQVisionLayer"),
            *("got_ocr2.modeling_got_ocr2.GotOcr2VisionLayer", "slanext.modeling_slanext.SLANeXtVisionLayer"),
            "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionLayer",
            "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionLayer",
            "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionLayer",
        )
    ),
    *_transformers(
        "sam3.modeling_sam3", ("Sam3ViTLayer", None, "rotary positions within windows, which the op has not")
    ),
    *_transformers("rf_detr.modeling_rf_detr", ("RfDetrDinov2Layer", None, CUT_ONCE)),
    *_transformers("lw_detr.modeling_lw_detr", ("LwDetrViTLayer", None, CUT_ONCE)),
    *_monai(
        ("nets.swin_unetr.SwinTransformerBlock", "monai_swin_unetr.FastSwinUNETRBlock", ATTENTION),
        ("nets.swin_unetr.BasicLayer", "monai_swin_unetr.FastSwinUNETRStage", NO_MASK),
        ("nets.swin_unetr.PatchMerging", "monai_swin_unetr.FastSwinUNETRPatchMerging", f"of images: {MERGE}"),
        ("nets.swin_unetr.PatchMergingV2", "monai_swin_unetr.FastSwinUNETRPatchMergingV2", f"of images: {MERGE}"),
        ("blocks.patchembedding.PatchEmbed", None, SMALL),
        ("blocks.mlp.MLPBlock", "monai_swin_unetr.FastMonaiMLP", PARTS),
    ),
    *_structures(
        "microsoft_swin",
        ("microsoft/Swin-Transformer: SwinTransformerBlock", "FastMicrosoftSwinBlock", ATTENTION),
        ("microsoft/Swin-Transformer: SwinTransformerBlock of V2", "FastMicrosoftSwinV2Block", ATTENTION),
        ("microsoft/Swin-Transformer: PatchMerging", "FastMicrosoftPatchMerging", MERGE),
        ("microsoft/Swin-Transformer: PatchEmbed", "FastMicrosoftPatchEmbed", EMBED),
        ("microsoft/Swin-Transformer: Mlp", "FastMicrosoftMlp", PARTS),
    ),
    *_structures(
        "microsoft_detection",
        ("SwinTransformer/Swin-Transformer-Object-Detection: SwinTransformerBlock", "FastBackboneBlock", ATTENTION),
        ("SwinTransformer/Swin-Transformer-Object-Detection: BasicLayer", "FastBackboneStage", NO_MASK),
        ("SwinTransformer/Swin-Transformer-Object-Detection: PatchMerging", "FastBackbonePatchMerging", MERGE),
    ),
    *_structures(
        "video_swin",
        ("SwinTransformer/Video-Swin-Transformer: SwinTransformerBlock3D", "FastVideoSwinBlock", ATTENTION),
        ("SwinTransformer/Video-Swin-Transformer: BasicLayer", "FastVideoSwinStage", NO_MASK),
        ("SwinTransformer/Video-Swin-Transformer: PatchMerging", "FastVideoPatchMerging", MERGE),
    ),
    *_structures(
        "image_restoration",
        ("JingyunLiang/SwinIR: SwinTransformerBlock", "FastSwinIRBlock", f"{ATTENTION}; {NO_MASK}"),
        ("XPixelGroup/HAT: HAB", "FastHybridAttentionBlock", ATTENTION),
        ("XPixelGroup/HAT: OCAB", "FastOverlappingCrossAttention", ATTENTION),
        ("XPixelGroup/HAT: HAT", "FastHybridAttentionTransformer", NO_MASK),
    ),
    *_structures(
        "mm_swin",
        ("open-mmlab/mmdetection: ShiftWindowMSA", "FastShiftWindowMSA", f"{ATTENTION}; {NO_MASK}"),
        ("open-mmlab/mmpretrain: ShiftWindowMSA", "FastPretrainShiftWindowMSA", f"{ATTENTION}; {NO_MASK}"),
        (
            "open-mmlab/mmpretrain: ShiftWindowMSA of WindowMSAV2",
            "FastPretrainShiftWindowMSAV2",
            f"{ATTENTION}; {NO_MASK}",
        ),
    ),
    *_structures(
        "asvit_original",
        ("VITA-Group/AsViT: TransformerBlock", "FastAuthorsTransformerBlock", ATTENTION),
        ("VITA-Group/AsViT: PatchMerging", "FastAuthorsPatchMerging", MERGE),
        ("VITA-Group/AsViT: PatchEmbed", "FastAuthorsPatchEmbed", EMBED),
    ),
)


def families_table() -> str:
    """``FAMILIES`` as a Markdown table."""
    head = ["| module | becomes | what it brings |", "|---|---|---|"]
    return "\n".join([*head, *(family.table_row() for family in FAMILIES)])


_registered: list[Family] = []  # the last first


def register(replacement: type[Replacement], notes: str = ATTENTION) -> type[Replacement]:
    """Make ``accelerate`` give modules a class of your own. A decorator of that class, too.

    Args:
        replacement: derived from ``Replacement`` and the class that it replaces; or from ``Structural``, for code that
            people copy, which is recognised by its attributes and methods.
        notes: what it brings, for tables.

    Returns:
        The class. What is registered later comes first, and before ``FAMILIES``.

    Raises:
        InputError: it is not derived from ``Replacement``, or does not say what it replaces.
    """
    if not (isinstance(replacement, type) and issubclass(replacement, Replacement)):
        raise InputError(f"register: a class derived from Replacement is needed, got {replacement!r}")
    by_structure = issubclass(replacement, Structural)
    if by_structure and not (getattr(replacement, "structure", None) and hasattr(replacement, "origin")):
        raise InputError(f"register: {replacement.__name__} needs a structure and an origin, as it is Structural")
    if not by_structure and not hasattr(replacement, "source"):
        raise InputError(f"register: {replacement.__name__} must also be derived from the class that it replaces")
    source = replacement.origin if issubclass(replacement, Structural) else qualified_name(replacement.source)
    unregister(replacement)
    _registered.insert(0, Family(source, replacement, notes, by_structure))
    return replacement


def unregister(replacement: type[Replacement]) -> None:
    """Undo ``register``; nothing happens if it was not."""
    _registered[:] = [family for family in _registered if family.replacement is not replacement]


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _families() -> tuple[Family, ...]:
    return (*_registered, *FAMILIES)


def _structural() -> Iterator[tuple[Family, type[Structural]]]:
    for family in _families():
        if family.by_structure:
            yield family, family.load()  # type: ignore[misc]


def _by_template(template: type) -> Family | None:
    """The family of a replacement that was given to a module."""
    found = (family for family, replacement in _structural() if replacement is template)
    return next(found, None)


def family_of(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """The family of the class of a module or of the nearest known base, and that class."""
    kinds: Any = type(module).__mro__
    for kind in kinds:
        if issubclass(kind, Structural) and "source" in vars(kind):
            family = _by_template(kind.__bases__[0])
            return None if family is None else (Family(family.source, kind, family.notes, True), kind.source)
        name = qualified_name(kind)
        for family in _families():
            if name == family.source:
                return family, kind
    if not is_own_code(module):
        return None
    for family, replacement in _structural():
        if looks_like(replacement, module) and structure_reason(replacement, module) is None:
            kind = bound_to(replacement, module)
            return Family(family.source, kind, family.notes, True), kind.source
    return None


def likeness(module: nn.Module) -> str | None:
    """Why the code of a module that has all attributes of a known windowed attention is not recognised; None if it has
    those of none."""
    if not is_own_code(module):
        return None
    windowed = (replacement for _, replacement in _structural() if "window_attention" in replacement.ops)
    alike = [replacement for replacement in windowed if looks_like(replacement, module)]
    alike.sort(key=lambda replacement: -len(replacement.reads))  # the most particular first
    reasons = (structure_reason(replacement, module) for replacement in alike)
    return next((why for why in reasons if why is not None), None)


def replacement_of(family: Family, source: type[nn.Module]) -> type[Replacement] | None:
    """The class that instances of a known class may become; ImportError or AttributeError if its package is of another
    version."""
    replacement = family.load()
    return None if replacement is None else bound(replacement, source)
