"""The names that timm knows: ``asvit`` (any topology) and the paper's sizes (arXiv 2202.11921, Table 4)."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..topology import NAMED_TOPOLOGIES, Topology
from .asvit import AsViT
from .state_dict import fit_state_dict

__all__ = ["asvit", "asvit_base", "asvit_large", "asvit_seed", "asvit_small"]


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc2",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in ("asvit", *NAMED_TOPOLOGIES)})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> AsViT:
    if variant in NAMED_TOPOLOGIES:
        kwargs.setdefault("topology", NAMED_TOPOLOGIES[variant])
    if isinstance(kwargs.get("topology"), Topology):
        kwargs["topology"] = str(kwargs["topology"])  # timm saves the arguments as JSON
    return build_model_with_cfg(
        AsViT,
        variant,
        pretrained,
        pretrained_filter_fn=fit_state_dict,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def asvit(pretrained: bool = False, **kwargs: Any) -> AsViT:
    """An As-ViT of any topology: ``timm.create_model("asvit", topology="8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88")``."""
    return _build("asvit", pretrained, **kwargs)


@register_model
def asvit_seed(pretrained: bool = False, **kwargs: Any) -> AsViT:
    """The seed topology that the paper's search found: 2.4 M parameters (arXiv 2202.11921, Table 4)."""
    return _build("asvit_seed", pretrained, **kwargs)


@register_model
def asvit_small(pretrained: bool = False, **kwargs: Any) -> AsViT:
    """As-ViT Small: 29.0 M parameters (arXiv 2202.11921, Table 4)."""
    return _build("asvit_small", pretrained, **kwargs)


@register_model
def asvit_base(pretrained: bool = False, **kwargs: Any) -> AsViT:
    """As-ViT Base: 52.6 M parameters (arXiv 2202.11921, Table 4)."""
    return _build("asvit_base", pretrained, **kwargs)


@register_model
def asvit_large(pretrained: bool = False, **kwargs: Any) -> AsViT:
    """As-ViT Large: 88.1 M parameters (arXiv 2202.11921, Table 4)."""
    return _build("asvit_large", pretrained, **kwargs)
