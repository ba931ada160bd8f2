"""Our backbones in detectron2: https://github.com/facebookresearch/detectron2.

``detectron2_backbone("asvit_small")`` in a LazyConfig; in a yaml config, MODEL.BACKBONE.NAME:
build_asvit_fast_backbone after ``register()``, with MODEL.ASVIT_FAST.NAME and MODEL.FPN.OUT_CHANNELS.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .backbone import backbone
from .bodies import STRIDES

NAMES = ("p2", "p3", "p4", "p5", "p6")  # detectron2's, of strides 4 to 64
DIVISIBILITY = STRIDES[-1]


def detectron2_backbone(name_or_model: str | nn.Module, **options: Any) -> Any:
    """A ``detectron2.modeling.Backbone``: images [B, 3, H, W] -> {"p2": [B, C, h, w], ..., "p6"} of strides 4 to 64.

    Arguments are those of ``asvit_fast.detection.backbone``. Raises ImportError without detectron2.
    """
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone

    class AsViTFastBackbone(Backbone):
        """The contract of detectron2's backbones."""

        def __init__(self) -> None:
            super().__init__()
            self.pyramid = backbone(name_or_model, **options)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return dict(zip(NAMES, self.pyramid(x).values(), strict=True))

        def output_shape(self) -> dict[str, Any]:
            strides = (*STRIDES, 2 * STRIDES[-1])
            channels = self.pyramid.out_channels
            return {
                name: ShapeSpec(channels=channels, stride=stride) for name, stride in zip(NAMES, strides, strict=True)
            }

        @property
        def size_divisibility(self) -> int:
            return DIVISIBILITY

        @property
        def padding_constraints(self) -> dict[str, int]:
            return {"square_size": 0, "size_divisibility": DIVISIBILITY}

    return AsViTFastBackbone()


def register() -> None:
    """Make ``build_asvit_fast_backbone`` known to detectron2's yaml configurations. Raises ImportError without it."""
    from detectron2.modeling import BACKBONE_REGISTRY

    if "build_asvit_fast_backbone" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(build_asvit_fast_backbone)


def build_asvit_fast_backbone(cfg: Any, input_shape: Any) -> Any:
    """Make the backbone of a yaml configuration."""
    return detectron2_backbone(cfg.MODEL.ASVIT_FAST.NAME, out_channels=cfg.MODEL.FPN.OUT_CHANNELS)
