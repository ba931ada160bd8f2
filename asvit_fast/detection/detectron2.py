"""Our backbones in detectron2: https://github.com/facebookresearch/detectron2. Importing this module registers them.

A LazyConfig has ``L(AsViTFastBackbone)(name_or_model="asvit_small")`` as its backbone. A yaml configuration, after
``add_config(cfg)``, has MODEL.BACKBONE.NAME: build_asvit_fast_backbone, and MODEL.ASVIT_FAST.NAME and .OPTIONS.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import InputError
from .backbone import backbone
from .bodies import STRIDES

LEVELS = {f"p{index}": stride for index, stride in enumerate((*STRIDES, 2 * STRIDES[-1]), 2)}  # detectron2's names


class AsViTFastBackbone(Backbone):
    """Images [B, 3, H, W] -> {"p2": [B, out_channels, h, w], ..., "p6"} of strides 4 to 64, by a pyramid of its own.

    Args:
        name_or_model: a topology, a name of timm or torchvision, or a network, which is copied.
        options: the other arguments of ``asvit_fast.detection.backbone`` (out_channels, frozen_stages, windows, ...);
            ``checkpoint_path`` are weights of a classifier to start from.

    Raises:
        InputError: as ``asvit_fast.detection.backbone``.
    """

    def __init__(self, name_or_model: str | nn.Module, **options: Any) -> None:
        super().__init__()
        self.pyramid = backbone(name_or_model, **options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(LEVELS, self.pyramid(x).values(), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = self.pyramid.out_channels
        return {name: ShapeSpec(channels=channels, stride=stride) for name, stride in LEVELS.items()}

    @property
    def size_divisibility(self) -> int:
        return STRIDES[-1]

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": 0, "size_divisibility": self.size_divisibility}


def add_config(cfg: CfgNode) -> None:
    """Give a configuration of ``get_cfg()`` the keys of ``build_asvit_fast_backbone``, before a file is merged into it.

    MODEL.ASVIT_FAST.NAME is a topology or a name, MODEL.ASVIT_FAST.OPTIONS any arguments of
    ``asvit_fast.detection.backbone`` but out_channels, which is MODEL.FPN.OUT_CHANNELS.
    """
    cfg.MODEL.ASVIT_FAST = CfgNode({"NAME": "asvit_small"})
    cfg.MODEL.ASVIT_FAST.OPTIONS = CfgNode(new_allowed=True)


@BACKBONE_REGISTRY.register()
def build_asvit_fast_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AsViTFastBackbone:
    """The backbone of a yaml configuration. Raises InputError where ``add_config`` was left out."""
    if "ASVIT_FAST" not in cfg.MODEL:
        raise InputError(
            "the configuration has no MODEL.ASVIT_FAST; call asvit_fast.detection.detectron2.add_config(cfg) first"
        )
    ours = cfg.MODEL.ASVIT_FAST
    return AsViTFastBackbone(ours.NAME, out_channels=cfg.MODEL.FPN.OUT_CHANNELS, **ours.OPTIONS)
