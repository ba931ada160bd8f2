"""Our backbones in mmdetection: https://github.com/open-mmlab/mmdetection. Importing this module registers them.

custom_imports = dict(imports=["asvit_fast.detection.mmdet"])
model = dict(backbone=dict(type="AsViTFast", name="asvit_small"), neck=dict(in_channels=[88, 176, 352, 704]), ...)
"""

from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor

from .backbone import backbone


@MODELS.register_module()
class AsViTFast(BaseModule):
    """Images [B, 3, H, W] -> the four normalised maps of strides 4, 8, 16, 32 as a tuple; the pyramid is mmdet's neck.

    Args:
        name: a topology, or a name of timm or torchvision.
        with_cp: compute activations again in the backward pass.
        init_cfg: mmengine's initialisation.
        options: the other arguments of ``asvit_fast.detection.backbone`` (frozen_stages, windows, drop_path_rate, ...).
    """

    def __init__(self, name: str, with_cp: bool = False, init_cfg: Any = None, **options: Any) -> None:
        super().__init__(init_cfg)
        self.maps = backbone(name, grad_checkpointing=with_cp, **options)
        del self.maps.fpn  # weights that nobody uses stop DistributedDataParallel

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.maps.features(x))
